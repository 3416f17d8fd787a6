"""RoBERTa for sequence classification, and its modules with a head of their own, against torch."""

import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel

from lora_jax import checkpoint, merge, models, peft
from lora_jax.modules import IA3, Saved

PAD = 1
LORA = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"]}
CASES = {
    "LoRA": LoraConfig(task_type="SEQ_CLS", **LORA),
    "IA3, PEFT's own targets": IA3Config(task_type="SEQ_CLS"),
    "IA3, the PEM paper's": IA3Config(
        task_type="SEQ_CLS",
        target_modules=["key", "value", "intermediate.dense"],
        feedforward_modules=[],
    ),
}


RANDOM = (
    "RobertaForSequenceClassification",
    {
        "layer_norm_eps": 1e-5,
        "pad_token_id": PAD,
        "id2label": {0: "no", 1: "maybe", 2: "yes"},
        "label2id": {"no": 0, "maybe": 1, "yes": 2},
    },
)


@pytest.fixture
def classifier(pair):
    """A random classifier of three labels in torch, and its config and weights here."""
    return pair(*RANDOM)


@pytest.fixture
def theirs(classifier):
    return classifier[0]


@pytest.fixture
def base(classifier):
    return classifier[1:]


@pytest.fixture
def batch(random_tokens):
    """Tokens and segments (3, 20) of unequal texts, padded on the right."""
    segments = (np.arange(20) < np.array([20, 13, 6])[:, None]).astype(np.int32)
    tokens = 3 + np.asarray(random_tokens(3, 20)) % 93
    return np.where(segments > 0, tokens, PAD), segments


def ours(config, weights, adapter, batch):
    tokens, segments = batch
    states = models.forward(config, weights, adapter, tokens, segments=segments).hidden
    return models.classify(config, weights, adapter, states, segments)


def torchs(model, batch, **options):
    tokens, segments = (torch.tensor(x).long() for x in batch)
    return model(tokens, attention_mask=segments, **options)


@pytest.mark.parametrize("types", [1, 2])
def test_what_transformers_saves_computes_the_same_here(pair, batch, agree, types):
    model, config, weights = pair(RANDOM[0], RANDOM[1] | {"type_vocab_size": types})
    assert config.labels == ("no", "maybe", "yes")
    theirs = torchs(model, batch).logits.detach()
    agree(f"RoBERTa, {types} token types", ours(config, weights, {}, batch), theirs, 1e-4)


def test_what_we_save_computes_the_same_there(tmp_path, theirs, base, batch, agree):
    checkpoint.save_model(tmp_path / "ours", *base)
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == theirs.config.id2label
    found = torchs(model.eval(), batch).logits.detach()
    agree("RoBERTa, saved by us", ours(*base, {}, batch), found, 1e-4)


def test_packed_texts_are_each_as_alone(pair, batch, agree):
    """One row of three texts: the states of each are torch's of it by itself."""
    model, config, weights = pair("RobertaForMaskedLM", RANDOM[1])
    tokens, segments = batch
    packed, told = tokens[segments > 0], (np.arange(1, 4)[:, None] * segments)[segments > 0]
    states = models.forward(config, weights, {}, packed[None], segments=told[None]).hidden[0]
    whole = torchs(model, batch, output_hidden_states=True).hidden_states[-1].detach().numpy()
    agree("RoBERTa, packed", states, whole[segments > 0], 1e-4)


def test_a_masked_language_model_is_a_base_with_a_new_head(pair, batch, agree):
    model, config, weights = pair("RobertaForMaskedLM", RANDOM[1])
    tokens, segments = batch
    states = models.forward(config, weights, {}, tokens, segments=segments).hidden
    whole = torchs(model, batch, output_hidden_states=True).hidden_states[-1].detach().numpy()
    real = segments[..., None]
    agree("RoBERTa for masked language, states", states * real, whole * real, 1e-4)
    assert weights["classifier.out_proj"].shape == (32, 3)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_changes_the_labels_alike(
    tmp_path, theirs, base, batch, with_modules, name, agree
):
    before = torchs(theirs, batch).logits.detach().numpy()
    model = with_modules(theirs, CASES[name])
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", base[0])
    assert {p for p, m in adapter.items() if isinstance(m, Saved)} == set(
        models.head_paths(base[0])
    )
    after = torchs(model, batch).logits.detach().numpy()
    assert np.abs(after - before).max() > 0.1
    agree(f"{name} and a head from PEFT", ours(*base, adapter, batch), after, 1e-4)
    merged = merge.merge(base[1], adapter)
    agree(f"{name} and a head, merged", ours(base[0], merged, {}, batch), after, 1e-4)


@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_pefts_ia3_targets_are_our_layouts(tmp_path, theirs, base, with_modules, layout):
    """PEFT's "output.dense" is the attention's output too, by its input."""
    name = "IA3, PEFT's own targets" if layout == "peft" else "IA3, the PEM paper's"
    with_modules(theirs, CASES[name]).save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", base[0])
    sides = {path: m.on for path, m in adapter.items() if isinstance(m, IA3)}
    assert sides == models.ia3_layouts(base[0])[layout]


@pytest.mark.parametrize("kind", ["LoRA", "peft", "pem"])
def test_what_we_save_changes_pefts_labels_alike(
    tmp_path, theirs, base, batch, random_lora, random_ia3, kind, agree
):
    config, weights = base
    if kind == "LoRA":
        adapter = random_lora(config, targets=["query", "output.dense"])
    else:
        adapter = random_ia3(config, layout=kind)
    head = {path: Saved(weights[path] + 0.1) for path in models.head_paths(config)}
    peft.save_adapter(tmp_path / "a", adapter | head, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing key is a warning
        model = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    found = torchs(model, batch).logits.detach()
    agree(f"{kind} and a head to PEFT", ours(*base, adapter | head, batch), found, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_module_and_the_head(
    tmp_path, theirs, base, batch, with_modules, name, agree_on_gradients
):
    """Of the mean cross-entropy of the labels, by every tensor that is trained."""
    config, weights = base
    model = with_modules(theirs, CASES[name])
    model.save_pretrained(tmp_path / "a")
    adapter, targets = peft.load_adapter(tmp_path / "a", config), np.array([2, 0, 1])

    def loss(adapter):
        chances = jax.nn.log_softmax(ours(config, weights, adapter, batch))
        return -chances[np.arange(3), targets].mean()

    found = jax.jit(jax.value_and_grad(loss))(adapter)
    wanted = torchs(model, batch, labels=torch.tensor(targets)).loss
    agree_on_gradients(name, config, found, wanted, model)

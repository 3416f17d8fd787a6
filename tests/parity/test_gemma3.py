"""Gemma 3 against transformers and PEFT on torch: random models, and the real 270M if fetched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from lora_jax import checkpoint, models, peft, tokens
from lora_jax.modules import IA3, LoRA

WINDOW = 5
GEMMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
MODELS = {
    "gemma3": GEMMA,
    "gemma3, every sixth global": GEMMA | {"num_hidden_layers": 6, "layer_types": None},
    "gemma3, scaled rope": GEMMA | {"rope_parameters": ROPES},
    "gemma3, untied": GEMMA | {"tie_word_embeddings": False},
}


def random_torch(name, seed=0):
    """A random model; its norms too, which transformers starts at zero."""
    torch.manual_seed(seed)
    config = transformers.Gemma3TextConfig(**MODELS[name], initializer_range=0.2)
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pair(tmp_path):
    """A function from a model's name to it in torch, and to its config and weights here."""

    def make(name="gemma3"):
        model = random_torch(name)
        model.save_pretrained(tmp_path / "theirs")
        config = checkpoint.read_config(tmp_path / "theirs")
        return model, config, checkpoint.load_weights(tmp_path / "theirs", config)

    return make


@pytest.fixture
def rows(random_tokens):
    """Texts far longer than the window."""
    return np.asarray(random_tokens(2, 24)) % GEMMA["vocab_size"]


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_computes_the_same_here(
    name, pair, rows, logits, torch_logits, agree
):
    model, config, weights = pair(name)
    agree(name, logits(config, weights, {}, rows), torch_logits(model, rows), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_computes_the_same_there(
    tmp_path, name, pair, rows, logits, torch_logits, torch_model, agree
):
    _, config, weights = pair(name)
    checkpoint.save_model(tmp_path / "ours", config, weights)
    assert checkpoint.read_config(tmp_path / "ours") == config
    theirs = torch_logits(torch_model(tmp_path / "ours"), rows)
    agree(f"{name}, saved by us", logits(config, weights, {}, rows), theirs, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, pair, rows, logits, torch_logits, agree):
    model, config, weights = pair()
    real = np.arange(24) >= np.array([[0], [9]])
    real = real if side == "left" else real[:, ::-1]
    theirs = torch_logits(
        model,
        rows,
        attention_mask=torch.tensor(real.astype(np.int64)),
        position_ids=torch.tensor(np.maximum(np.cumsum(real, axis=1) - 1, 0)),
    )
    ours = logits(config, weights, {}, rows, segments=jnp.asarray(real, jnp.int32))
    agree(f"gemma3, padded on the {side}", ours[real], theirs[real], 1e-4)


def test_packed_texts_are_each_as_alone_in_torch(pair, rows, logits, torch_logits, agree):
    model, config, weights = pair()
    segments = jnp.asarray([[1] * 7 + [2] * 11 + [3] * 6])
    ours = logits(config, weights, {}, rows[:1], segments=segments)
    parts = np.split(rows[:1], [7, 18], axis=1)
    theirs = np.concatenate([torch_logits(model, part) for part in parts], axis=1)
    agree("gemma3, packed", ours, theirs, 1e-4)


def test_step_by_step_through_the_cache(pair, rows, torch_logits, agree):
    model, config, weights = pair()
    cache, seen = models.new_cache(config, 2, 24), []
    step = jax.jit(lambda tokens, cache: models.forward(config, weights, {}, tokens, cache=cache))
    for start in range(0, 24, 4):
        out = step(rows[:, start : start + 4], cache)
        cache = out.cache
        seen.append(models.unembed(config, weights, {}, out.hidden))
    agree("gemma3, cached", np.concatenate(seen, 1), torch_logits(model, rows), 1e-4)


def test_bfloat16_rounds_where_torch_does(pair, rows, logits, torch_logits, agree):
    """Embeddings are scaled by a rounded root, and norms multiply before they round."""
    model, config, weights = pair()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    scaled = models.family(config).begin(config, half, half["embed"][rows], _places(rows))[0]
    embed = model.to(torch.bfloat16).get_input_embeddings()
    with torch.no_grad():
        theirs = embed(torch.tensor(rows)).float().numpy()
    agree("gemma3, scaled embeddings in bfloat16", scaled.astype(jnp.float32), theirs, 0)


def _places(rows):
    from lora_jax import decoder

    return decoder.place(jnp.asarray(rows), None, None, None)


ADAPTERS = {
    "LoRA on attention": LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    ),
    "LoRA on all": LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "IA3, PEFT's choice": IA3Config(task_type="CAUSAL_LM"),
}


def shaken(model, settings):
    """A PEFT model whose modules are random, so that they change what comes out."""
    model = get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_l" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, name, pair, rows, logits, torch_logits, agree
):
    model, config, weights = pair()
    before = torch_logits(model, rows)
    model = shaken(model, ADAPTERS[name])
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    after = torch_logits(model, rows)
    assert np.abs(after - before).max() > 0.1
    agree(f"gemma3, {name} from PEFT", logits(config, weights, adapter, rows), after, 1e-4)


@pytest.mark.parametrize("kind", ["lora", "peft", "pem"])
def test_a_module_of_ours_changes_pefts_model_alike(
    tmp_path, kind, pair, rows, logits, torch_logits, random_lora, random_ia3, agree
):
    model, config, weights = pair()
    targets = models.default_targets(config)
    adapter = (
        random_lora(config, targets=targets) if kind == "lora" else random_ia3(config, layout=kind)
    )
    peft.save_adapter(tmp_path / "adapter", adapter, config)
    theirs = torch_logits(PeftModel.from_pretrained(model, tmp_path / "adapter"), rows)
    agree(f"gemma3, {kind} to PEFT", logits(config, weights, adapter, rows), theirs, 1e-4)


def test_ia3_rescales_what_peft_chooses(pair):
    model, config, _ = pair()
    chosen = get_peft_model(model, IA3Config(task_type="CAUSAL_LM")).peft_config["default"]
    ours = models.ia3_layouts(config)["peft"]
    assert {path.rsplit(".", 1)[-1] for path in ours} == chosen.target_modules
    fed = {path.rsplit(".", 1)[-1] for path, side in ours.items() if side == "input"}
    assert fed == chosen.feedforward_modules


def test_a_lora_of_the_embedding_is_scaled_as_the_embedding_is(
    pair, rows, hidden, torch_logits, agree
):
    model, config, weights = pair("gemma3, untied")
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = shaken(model, settings)
    theirs = model.base_model.model.model.embed_tokens
    a, b = (
        jnp.asarray(matrix["default"].detach().numpy().T)
        for matrix in (theirs.lora_embedding_A, theirs.lora_embedding_B)
    )
    states = hidden(config, weights, {"embed": LoRA(a, b, 1.5)}, rows)
    ours = models.unembed(config, weights, {}, states)
    agree("gemma3, LoRA of the embedding", ours, torch_logits(model, rows), 1e-4)


@pytest.mark.parametrize("name", ["LoRA on attention", "IA3, PEFT's choice"])
def test_gradients(tmp_path, name, pair, rows, agree):
    """Of the mean cross-entropy of the next token, by the adapter's every tensor."""
    model, config, weights = pair()
    model = shaken(model, ADAPTERS[name])
    model.save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)

    def loss(adapter):
        states = models.forward(config, weights, adapter, jnp.asarray(rows)).hidden[:, :-1]
        chances = jax.nn.log_softmax(models.unembed(config, weights, {}, states))
        return -jnp.mean(jnp.take_along_axis(chances, rows[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss))(adapter)
    labels = torch.tensor(rows).long()
    out = model(labels, labels=labels)
    out.loss.backward()
    agree(f"gemma3, {name}, loss", value, out.loss.item(), 1e-5)
    found = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()}
    pairs = list(_paired(gradients, found))
    assert len(pairs) == sum(gradient is not None for gradient in found.values())
    scaled = [[tensor.ravel() / np.abs(b).max() for tensor in (a, b)] for a, b in pairs]
    ours, theirs = (np.concatenate(side) for side in zip(*scaled, strict=True))
    agree(f"gemma3, {name}, gradients, each over its tensor's largest", ours, theirs, 1e-4)


def _paired(gradients, found):
    """Our gradients and torch's, tensor by tensor, in PEFT's orientation."""
    for path, module in gradients.items():
        for layer in range(len(jax.tree.leaves(module)[0])):
            stem = f"base_model.model.model.layers.{layer}.{path}"
            match module:
                case LoRA(a, b):
                    yield np.asarray(a[layer].T), found[f"{stem}.lora_A.weight"].numpy()
                    yield np.asarray(b[layer].T), found[f"{stem}.lora_B.weight"].numpy()
                case IA3(offset):
                    yield np.asarray(offset[layer]), found[f"{stem}.ia3_l"].numpy().reshape(-1)


TEXTS = [
    "The bridge over the river was closed for repairs until the spring.",
    "Le pont sur la rivière est resté fermé pour travaux jusqu'au printemps.",
    "Die Brücke über den Fluss blieb wegen Bauarbeiten bis zum Frühjahr gesperrt.",
]


def test_the_real_model(gemma, logits, torch_logits, torch_model, agree):
    tokenizer = tokens.load_tokenizer(gemma.folder)
    ids = tokenizer(TEXTS)["input_ids"]
    width = max(map(len, ids))
    real = np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    rows = np.array([row + [0] * (width - len(row)) for row in ids])
    theirs = torch_logits(torch_model(gemma.folder), rows, attention_mask=torch.tensor(real))
    ours = logits(gemma.config, gemma.weights, {}, rows, segments=jnp.asarray(real))
    shown = real[..., None] == 1
    agree("Gemma-3-270M logits, en, fr, de", ours * shown, theirs * shown, 1e-3)


def test_the_real_model_past_its_window(gemma, logits, torch_logits, torch_model, agree):
    """A text longer than the 512 tokens that local layers reach back."""
    tokenizer = tokens.load_tokenizer(gemma.folder)
    row = np.array([tokenizer(" ".join(TEXTS * 14))["input_ids"][:640]])
    assert row.shape == (1, 640)
    ours = logits(gemma.config, gemma.weights, {}, row)[:, -32:]
    theirs = torch_logits(torch_model(gemma.folder), row)[:, -32:]
    agree("Gemma-3-270M logits, tokens 608 to 640", ours, theirs, 1e-3)

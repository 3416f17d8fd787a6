"""Random T5 models of the three kinds against transformers, and PEFT's modules on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from eval.generation import Sampling, generate
from lora_jax import checkpoint, merge, models, peft
from lora_jax.families import t5
from train.loss import Batch, Source, batch_loss

T5 = {
    "d_kv": 12,
    "d_ff": 56,
    "num_hidden_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,  # texts reach farther
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS = {"v1.0": T5, "v1.1": T5 | V1_1, "v1.1, shared": T5 | V1_1, "flan": T5 | V1_1}
SOURCE = np.array([13, 24, 1, 17])  # tokens of each row of the source


@pytest.fixture
def pair(tmp_path, random_torch, load):
    """A function from a kind to a random model in torch, and its config and weights here.

    It is saved in `tmp_path / "theirs"`, Flan's with the config that Google wrote.
    """

    def make(name):
        model = random_torch("T5ForConditionalGeneration", KINDS[name], noise=0.5)
        if name in ("v1.1", "flan"):  # transformers 5 ties them until they differ
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
        folder = tmp_path / "theirs"
        model.save_pretrained(folder)
        if name == "flan":
            path = folder / "config.json"
            raw = json.loads(path.read_text()) | {"tie_word_embeddings": False, "n_positions": 512}
            del raw["scale_decoder_outputs"]
            path.write_text(json.dumps(raw))
        return model, *load(folder)

    return make


@pytest.fixture(scope="module")
def source(random_tokens):
    """Sources of unequal lengths, and which of their places are real."""
    segments = (np.arange(24) < SOURCE[:, None]).astype(np.int32)
    return np.asarray(random_tokens(4, 24)) % 96 * segments, segments


@pytest.fixture(scope="module")
def target(random_tokens):
    """Texts of unequal lengths for the decoder, and which of their places are real."""
    segments = (np.arange(18) < np.array([18, 5, 11, 14])[:, None]).astype(np.int32)
    tokens = np.asarray(random_tokens(4, 18, seed=1)) % 96
    tokens[:, 0] = 0
    return tokens * segments, segments


@pytest.fixture(scope="module")
def logits():
    """A function to our logits (B, T, V) of a source and a target."""

    def run(config, weights, adapter, source, target):
        memory = models.encode(config, weights, adapter, *source)
        out = models.forward(config, weights, adapter, target[0], segments=target[1], memory=memory)
        return models.unembed(config, weights, adapter, out.hidden)

    return jax.jit(run, static_argnums=0)


@pytest.fixture(scope="module")
def torch_logits():
    """A function to a torch model's logits of a source and a target."""

    def run(model, source, target):
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        given = zip(names, (*source, *target), strict=True)
        with torch.no_grad():
            return model(**{n: torch.tensor(x).long() for n, x in given}).logits.numpy()

    return run


@pytest.mark.parametrize("name", KINDS)
def test_what_transformers_saves_computes_the_same_here(
    pair, name, source, target, logits, torch_logits, agree
):
    model, config, weights = pair(name)
    assert config.tied == (name == "v1.0")
    real = target[1] > 0
    ours = np.asarray(logits(config, weights, {}, source, target))[real]
    agree(f"T5 {name}", ours, torch_logits(model, source, target)[real], 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_what_we_save_computes_the_same_there(
    tmp_path, pair, name, source, target, logits, torch_logits, agree
):
    _, config, weights = pair(name)
    checkpoint.save_model(tmp_path / "ours", config, weights)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    real = target[1] > 0
    ours = np.asarray(logits(config, weights, {}, source, target))[real]
    agree(f"T5 {name}, saved by us", ours, torch_logits(model, source, target)[real], 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_packed_texts_are_each_as_alone(pair, name, source, target, logits, torch_logits, agree):
    """One row of all sources and one of all targets, each of which reads its own source."""
    model, config, weights = pair(name)

    def packed(tokens, segments):
        told = (np.arange(1, len(segments) + 1)[:, None] * segments)[segments > 0]
        return tokens[segments > 0][None], told[None].astype(np.int32)

    found = logits(config, weights, {}, packed(*source), packed(*target))[0]
    agree(f"{name}, packed", found, torch_logits(model, source, target)[target[1] > 0], 1e-4)


def test_buckets_are_transformers():
    distances = np.arange(-700, 701)
    for both, count, far in [(True, 32, 128), (False, 32, 128), (True, 8, 12), (False, 10, 50)]:
        theirs = T5Attention._relative_position_bucket(
            torch.tensor(distances), bidirectional=both, num_buckets=count, max_distance=far
        )
        config = t5.Config(1, 1, 1, 1, 1, 1, 1, buckets=count, far=far)
        kernel = jnp.arange(count, dtype=jnp.float32)[:, None]
        ours = t5._bias(config, kernel, jnp.asarray(distances)[None, None], both)
        np.testing.assert_array_equal(ours[0, 0, 0], theirs.numpy())


def step_by_step(config, weights, source, target):
    """Logits of a target, two tokens at a time over a cache, the source read once."""

    @jax.jit
    def step(cache, memory, tokens, segments):
        out = models.forward(
            config, weights, {}, tokens, segments=segments, cache=cache, memory=memory
        )
        return out.cache, models.unembed(config, weights, {}, out.hidden)

    memory = models.encode(config, weights, {}, *source)
    cache, seen = models.new_cache(config, *target[0].shape), []
    for start in range(0, target[0].shape[1], 2):
        part = (x[:, start : start + 2] for x in target)
        cache, found = step(cache, memory, *part)
        seen.append(found)
    return np.concatenate(seen, axis=1)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_a_cached_decoder(pair, name, source, target, torch_logits, agree):
    model, config, weights = pair(name)
    ours = step_by_step(config, weights, source, target)
    real, theirs = target[1] > 0, torch_logits(model, source, target)
    agree(f"T5 {name}, step by step", ours[real], theirs[real], 1e-4)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_greedy_text_is_transformers(pair, name, source):
    model, config, weights = pair(name)
    tokens, mask = (torch.tensor(x).long() for x in source)
    # Its cache has as many layers as the encoder, which are too few for this decoder.
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}
    theirs = model.generate(tokens, attention_mask=mask, **options)
    prompts = [row[:size].tolist() for row, size in zip(source[0], SOURCE, strict=True)]
    ours = generate(
        config, weights, {}, prompts, stop=1, sampling=Sampling(max_new_tokens=12), tokens=60
    )
    for reply, row in zip(ours, theirs[:, 1:].tolist(), strict=True):
        assert reply == (row[: row.index(1)] if 1 in row else row)
    assert len({tuple(reply) for reply in ours}) > 1


SETTINGS = {
    "LoRA on q and v": LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=3, lora_alpha=7, target_modules=["q", "v"]
    ),
    "LoRA on all": LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=3, target_modules="all-linear"
    ),
    "IA3": IA3Config(task_type="SEQ_2_SEQ_LM"),  # PEFT's own for T5: k, v, and wo's input
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_what_peft_saves_changes_the_model_alike(
    tmp_path, pair, with_modules, kind, name, source, target, logits, torch_logits, agree
):
    model, config, weights = pair(kind)
    before = torch_logits(model, source, target)
    model = with_modules(model, SETTINGS[name])
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    after, real = torch_logits(model, source, target), target[1] > 0
    assert np.abs(after - before).max() > 0.1
    ours = np.asarray(logits(config, weights, adapter, source, target))
    agree(f"T5 {kind}, {name} from PEFT", ours[real], after[real], 1e-4)
    merged = logits(config, merge.merge(weights, adapter), {}, source, target)
    agree(f"T5 {kind}, {name} merged", np.asarray(merged)[real], after[real], 1e-4)


@pytest.mark.parametrize("name", ["LoRA", "LoRA on the encoder's q", "IA3"])
def test_what_we_save_changes_pefts_model_alike(
    tmp_path, pair, name, source, target, logits, torch_logits, random_lora, random_ia3, agree
):
    model, config, weights = pair("v1.1")
    some = {"targets": ("encoder.layer.0.SelfAttention.q",)}
    options = {"targets": ("q", "v", "wi_1")} if name == "LoRA" else some
    adapter = random_ia3(config) if name == "IA3" else random_lora(config, **options)
    peft.save_adapter(tmp_path / "a", adapter, config)
    settings = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    model = PeftModel.from_pretrained(model, tmp_path / "a")
    ours, real = logits(config, weights, adapter, source, target), target[1] > 0
    theirs = torch_logits(model, source, target)
    agree(f"T5, {name} to PEFT", np.asarray(ours)[real], theirs[real], 1e-4)
    found = {path for path, _ in model.named_parameters() if "lora_" in path or "ia3_l" in path}
    assert len(found) == sum(leaf.shape[0] for leaf in jax.tree.leaves(adapter))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients(tmp_path, pair, with_modules, name, source, target, agree_on_gradients):
    """Of the mean cross-entropy of a target's tokens, by the adapter's every tensor."""
    model, config, weights = pair("v1.0")
    model = with_modules(model, SETTINGS[name])
    model.save_pretrained(tmp_path / "a")
    adapter = peft.load_adapter(tmp_path / "a", config)
    tokens, mask = source
    made = Batch(
        np.where(target[1] > 0, np.c_[np.zeros(4, int), target[0][:, :-1]], 0),
        target[1],
        np.tile(np.arange(18), (4, 1)),
        np.tile(np.arange(18), (4, 1)),
        target[0],
        target[1].astype(np.float32),
        Source(tokens, mask),
    )
    batch, count = jax.tree.map(jnp.asarray, made), target[1].sum()
    loss = jax.value_and_grad(lambda a: batch_loss(config, weights, a, batch) / count)
    labels = np.where(target[1] > 0, target[0], -100)
    given = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    theirs = model(**{n: torch.tensor(x).long() for n, x in given.items()}).loss
    agree_on_gradients(f"T5, {name}", config, jax.jit(loss)(adapter), theirs, model)

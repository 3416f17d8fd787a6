"""Random causal models of every family, saved by transformers and read here, and back."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from lora_jax import checkpoint, models

ROPES = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0},
    "yarn": {"factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5},
    "longrope": {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]},
}


def scaled(kind, **given):
    """The keys of rotary scaling of a kind, from a context of 16 positions on."""
    given |= {"rope_type": kind, "rope_theta": 100.0, **ROPES[kind]}
    if kind == "dynamic":
        return {"rope_parameters": given, "max_position_embeddings": 16}
    return {"rope_parameters": given | {"original_max_position_embeddings": 16}}


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
PHI3 = {"original_max_position_embeddings": 16}
PHI = {"num_key_value_heads": 4}
GEMMA3 = {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20} | MIXED
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
FAMILIES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "head_dim": 12}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, a window of 5": ("Mistral", {"sliding_window": 5}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, a window of 5": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2, a window from layer 1 on": ("Qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen2, windows in layers 0 and 2": ("Qwen2", WINDOW | MIXED),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, biases, windows in layers 0 and 2": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True} | WINDOW | MIXED,
    ),
    **{f"llama, {kind}": ("Llama", scaled(kind)) for kind in ROPES},
    "mistral, yarn, a given factor": ("Mistral", scaled("yarn", attention_factor=1.7)),
    "qwen2, yarn, not truncated": ("Qwen2", scaled("yarn", truncate=False)),
    "phi3": ("Phi3", {"rope_theta": 500.0}),
    "phi3, a window of 5": ("Phi3", {"sliding_window": 5}),
    "phi3, longrope": ("Phi3", scaled("longrope") | PHI3),
    "phi3, tied, longrope on 3/4 of a head": (
        "Phi3",
        scaled("longrope", partial_rotary_factor=0.67)
        | PHI3
        | {"num_attention_heads": 2, "num_key_value_heads": 1}
        | {"hidden_size": 24, "tie_word_embeddings": True, "sliding_window": 20},
    ),
    "phi": ("Phi", PHI),
    "phi, a rotary quarter, shared keys": (
        "Phi",
        {"partial_rotary_factor": 0.25, "rope_theta": 5e4},
    ),
    "phi, normed queries and keys": ("Phi", PHI | {"qk_layernorm": True}),
    "phi, tied, exact gelu": ("Phi", PHI | {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3, every sixth global": (
        "Gemma3",
        GEMMA3 | {"num_hidden_layers": 6, "layer_types": None},
    ),
    "gemma3, scaled rope": ("Gemma3", GEMMA3 | {"rope_parameters": GEMMA3_ROPES}),
    "gemma3, untied": ("Gemma3", GEMMA3 | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2", {}),
    "gpt2, relu, n_inner 40": ("GPT2", {"activation_function": "relu", "n_inner": 40}),
    "gpt2, logits not scaled": ("GPT2", {"scale_attn_weights": False}),
    "gpt2, scaled by layer": (
        "GPT2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
}


@pytest.fixture
def rows(random_tokens):
    """Texts far longer than the windows."""
    return np.asarray(random_tokens(2, 24)) % 96


@pytest.fixture
def pair(pair):
    """A function from a name to a random model in torch, and its config and weights here."""

    def make(name):
        family, settings = FAMILIES[name]
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        return pair(f"{family}{head}", settings)

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_computes_the_same_here(
    pair, name, rows, logits, torch_logits, agree
):
    """Within the context that a scaling begins at, and beyond it."""
    model, config, weights = pair(name)
    for size in (12, 24):
        ours = logits(config, weights, {}, rows[:, :size])
        agree(f"{name}, {size} tokens", ours, torch_logits(model, rows[:, :size]), 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_save_computes_the_same_there(
    tmp_path, pair, name, rows, logits, torch_logits, torch_model, agree
):
    _, config, weights = pair(name)
    checkpoint.save_model(tmp_path / "ours", config, weights)
    assert checkpoint.read_config(tmp_path / "ours") == config
    theirs = torch_logits(torch_model(tmp_path / "ours"), rows)
    agree(f"{name}, saved by us", logits(config, weights, {}, rows), theirs, 1e-4)


def test_the_window_is_felt(pair, rows, logits):
    """Else the tests above would pass without one."""
    _, config, weights = pair("mistral, a window of 5")
    near, far = (logits(c, weights, {}, rows) for c in (config, replace(config, window=None)))
    np.testing.assert_allclose(near[:, :5], far[:, :5], atol=1e-4)
    assert not np.allclose(near[:, 5:], far[:, 5:], atol=0.1)


def test_shards_in_bfloat16(tmp_path, pair, load, rows, logits, torch_logits, torch_model, agree):
    model = pair("llama")[0].to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config, weights = load(tmp_path)
    theirs = torch_logits(torch_model(tmp_path), rows)
    agree("llama, bfloat16 shards", logits(config, weights, {}, rows), theirs, 1e-4)


def test_a_gpt2_without_its_prefix_and_with_its_masks(tmp_path, pair, rows, logits, agree):
    """As the first checkpoints were stored: bare names, and a causal mask in every layer."""
    from safetensors.numpy import load_file, save_file

    _, config, weights = pair("gpt2")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
    tensors |= {f"h.{n}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for n in range(3)}
    tensors |= {f"h.{n}.attn.masked_bias": np.float32([-1e4]) for n in range(3)}
    save_file(tensors, path)
    bare = checkpoint.load_weights(tmp_path / "theirs", config)
    ours, again = (logits(config, w, {}, rows) for w in (weights, bare))
    agree("gpt2 without its prefix", again, ours, 0)


PLACED = (
    "mistral, a window of 5",
    "qwen2, windows in layers 0 and 2",
    "qwen3, biases, windows in layers 0 and 2",
    "llama, llama3",
    "llama, dynamic",
    "phi3, a window of 5",
    "phi3, longrope",
    "phi",
    "gemma3",
    "gpt2",
)


@pytest.fixture
def texts(rows):
    """Texts of 14 and 19 tokens, within and beyond the context that a scaling begins at."""
    return rows[:1, :14], rows[1:, :19]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", PLACED)
def test_packed_texts_are_each_as_alone(pair, name, texts, logits, torch_logits, agree, counted):
    """Whether their positions are given or not."""
    model, config, weights = pair(name)
    segments = np.array([[0] * 3 + [1] * 14 + [2] * 19 + [0] * 4])
    packed = np.pad(np.concatenate(texts, 1), ((0, 0), (3, 4)), constant_values=7)
    positions = np.concatenate([np.zeros(3), *map(np.arange, (14, 19, 4))])[None].astype(int)
    given = {"positions": positions} if counted else {}
    found = logits(config, weights, {}, packed, segments=segments, **given)
    alone = np.concatenate([torch_logits(model, text) for text in texts], 1)
    agree(f"{name}, packed", found[:, 3:-4], alone, 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLACED)
def test_padded_texts_are_each_as_alone(pair, name, texts, logits, torch_logits, agree, side):
    model, config, weights = pair(name)
    around = (5, 0) if side == "left" else (0, 5)
    padded = np.concatenate([np.pad(texts[0], ((0, 0), around)), texts[1]])
    real = np.pad(np.ones((1, 14), np.int32), ((0, 0), around))
    real = np.concatenate([real, np.ones((1, 19), np.int32)])
    found = np.asarray(logits(config, weights, {}, padded, segments=real))
    alone = np.concatenate([torch_logits(model, text) for text in texts], 1)
    agree(f"{name}, padded on the {side}", found[real > 0][None], alone, 1e-4)


@pytest.mark.parametrize("name", [*PLACED, "phi, normed queries and keys", "gpt2, scaled by layer"])
def test_a_cache_step_by_step(pair, name, rows, agree):
    """Its keys stay as they were turned, there and here, when a text outgrows its context."""
    model, config, weights = pair(name)
    step = jax.jit(lambda tokens, cache: models.forward(config, weights, {}, tokens, cache=cache))
    cache, theirs, ours = models.new_cache(config, 2, 24), [], []
    past = transformers.DynamicCache(config=model.config)
    for start in range(0, 24, 3):
        tokens = rows[:, start : start + 3]
        out = step(tokens, cache)
        cache = out.cache
        ours.append(models.unembed(config, weights, {}, out.hidden))
        with torch.no_grad():
            theirs.append(model(torch.tensor(tokens), past_key_values=past).logits)
    agree(f"{name}, cached", np.concatenate(ours, 1), np.concatenate(theirs, 1), 1e-4)

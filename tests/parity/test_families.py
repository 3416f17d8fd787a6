"""Random Llamas, Mistrals, Qwens and Phi-3s, saved by transformers and read here, and back."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from lora_jax import checkpoint, models, peft

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
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
}


def random_torch(name, seed=0):
    """A random model of the family; its biases too, which transformers starts at zero."""
    torch.manual_seed(seed)
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def rows(random_tokens):
    """Texts far longer than the windows."""
    return np.asarray(random_tokens(2, 24)) % SHAPE["vocab_size"]


@pytest.fixture
def pair(tmp_path):
    """A function from a name to a random model in torch, and its config and weights here."""

    def make(name):
        model = random_torch(name)
        model.save_pretrained(tmp_path / "theirs")
        config = checkpoint.read_config(tmp_path / "theirs")
        return model, config, checkpoint.load_weights(tmp_path / "theirs", config)

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
    tmp_path, name, rows, logits, torch_logits, torch_model, agree
):
    random_torch(name, seed=1).save_pretrained(tmp_path / "theirs")
    config = checkpoint.read_config(tmp_path / "theirs")
    weights = checkpoint.load_weights(tmp_path / "theirs", config)
    checkpoint.save_model(tmp_path / "ours", config, weights)
    model = torch_model(tmp_path / "ours")
    ours = logits(config, weights, {}, rows)
    agree(f"{name}, saved by us", ours, torch_logits(model, rows), 1e-4)


def test_the_window_is_felt(tmp_path, rows, logits):
    """Else the tests above would pass without one."""
    random_torch("mistral, a window of 5").save_pretrained(tmp_path)
    config = checkpoint.read_config(tmp_path)
    weights = checkpoint.load_weights(tmp_path, config)
    near, far = (logits(c, weights, {}, rows) for c in (config, replace(config, window=None)))
    np.testing.assert_allclose(near[:, :5], far[:, :5], atol=1e-4)
    assert not np.allclose(near[:, 5:], far[:, 5:], atol=0.1)


def test_shards_in_bfloat16(tmp_path, rows, logits, torch_logits, torch_model, agree):
    model = random_torch("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config = checkpoint.read_config(tmp_path)
    ours = logits(config, checkpoint.load_weights(tmp_path, config), {}, rows)
    theirs = torch_logits(torch_model(tmp_path), rows)
    agree("llama, bfloat16 shards", ours, theirs, 1e-4)


PLACED = (
    "mistral, a window of 5",
    "qwen2, windows in layers 0 and 2",
    "qwen3, biases, windows in layers 0 and 2",
    "llama, llama3",
    "llama, dynamic",
    "phi3, a window of 5",
    "phi3, longrope",
)


@pytest.mark.parametrize("name", PLACED)
def test_padded_and_packed_texts_are_as_each_alone(pair, name, rows, logits, torch_logits, agree):
    """Texts of 14 and 19 tokens, within and beyond the context that a scaling begins at."""
    model, config, weights = pair(name)
    texts = [rows[:1, :14], rows[1:, :19]]
    alone = np.concatenate([torch_logits(model, text) for text in texts], 1)

    segments = np.array([[0] * 3 + [1] * 14 + [2] * 19 + [0] * 4])
    packed = np.pad(np.concatenate(texts, 1), ((0, 0), (3, 4)), constant_values=7)
    positions = np.concatenate([np.zeros(3), *map(np.arange, (14, 19, 4))])[None].astype(int)
    found = logits(config, weights, {}, packed, segments=segments, positions=positions)
    agree(f"{name}, packed", found[:, 3:-4], alone, 1e-4)

    padded = np.concatenate([np.pad(texts[0], ((0, 0), (5, 0))), texts[1]])
    real = np.arange(19) >= [[5], [0]]
    found = logits(config, weights, {}, padded, segments=real.astype(np.int32))
    agree(f"{name}, padded", np.asarray(found)[real][None], alone, 1e-4)


@pytest.mark.parametrize("name", PLACED)
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


FUSED = {
    "LoRA on qkv and o": lambda: LoraConfig(
        r=3, lora_alpha=7, target_modules=["qkv_proj", "o_proj"], task_type="CAUSAL_LM"
    ),
    "LoRA on all": lambda: LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "IA3": lambda: IA3Config(
        target_modules=["qkv_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("kind", FUSED)
def test_pefts_modules_on_phi3s_fused_projections(
    tmp_path, pair, kind, rows, logits, torch_logits, torch_model, agree
):
    model, config, weights = pair("phi3, longrope")
    before = torch_logits(model, rows)
    changed = get_peft_model(model, FUSED[kind]())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "lora_" in name or "ia3_l" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    changed.eval().save_pretrained(tmp_path / "adapter")
    adapter = peft.load_adapter(tmp_path / "adapter", config)
    after = torch_logits(changed, rows)
    assert np.abs(after - before).max() > 0.1
    agree(f"phi3, {kind}", logits(config, weights, adapter, rows), after, 1e-4)
    peft.save_adapter(tmp_path / "ours", adapter, config)
    again = PeftModel.from_pretrained(torch_model(tmp_path / "theirs"), tmp_path / "ours")
    agree(f"phi3, {kind}, saved by us", torch_logits(again, rows), after, 1e-5)

"""Random models of every family, saved by transformers and read here, and the other way round."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from lora_jax import checkpoint, models

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
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
}


def random_torch(name, seed=0):
    """A random model of the family; its biases too, which transformers starts at zero."""
    torch.manual_seed(seed)
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_computes_the_same_here(
    tmp_path, name, rows, logits, torch_logits, agree
):
    model = random_torch(name)
    model.save_pretrained(tmp_path)
    config = checkpoint.read_config(tmp_path)
    weights = checkpoint.load_weights(tmp_path, config)
    agree(name, logits(config, weights, {}, rows), torch_logits(model, rows), 1e-4)


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


def test_a_cached_window(tmp_path, rows, torch_logits, agree):
    model = random_torch("mistral, a window of 5")
    model.save_pretrained(tmp_path)
    config = checkpoint.read_config(tmp_path)
    weights = checkpoint.load_weights(tmp_path, config)
    cache, seen = models.new_cache(config, 2, 24), []
    for start in range(0, 24, 8):
        out = models.forward(config, weights, {}, rows[:, start : start + 8], cache=cache)
        cache = out.cache
        seen.append(models.unembed(config, weights, {}, out.hidden))
    agree("mistral, cached window", np.concatenate(seen, 1), torch_logits(model, rows), 1e-4)

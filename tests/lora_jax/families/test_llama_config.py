"""What a config.json of a Llama, Mistral or Qwen says, and what it asks in vain."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lora_jax import models, table
from lora_jax.errors import InputError
from lora_jax.rope import Rope


def test_kinds_round_trip_through_their_config_json(config):
    scaled = Rope(8, 5e5, "llama3", 8.0, 32, 1.0, 4.0)
    free = replace(config, tied=False, eps=1e-5, rope=scaled, output_bias=True, qkv_bias=True)
    mistral = replace(config, kind="mistral", window=9)
    qwen = replace(config, kind="qwen2", qkv_bias=True, layers=4)
    third = replace(config, kind="qwen3", qk_norm=True, layers=4)
    mixed = {"window": 9, "unwindowed": (0, 2)}
    for one in (
        config,
        free,
        mistral,
        qwen,
        replace(qwen, window=9),
        replace(qwen, **mixed),
        third,
    ):
        raw = json.loads(json.dumps(models.config_to_huggingface(one)))
        assert models.config_from_huggingface(raw) == one
        assert hash(models.config_from_huggingface(raw)) == hash(one)


def test_what_a_config_asks_in_vain_is_told_at_once(config):
    raw = models.config_to_huggingface(config)
    del raw["vocab_size"], raw["num_hidden_layers"]
    raw |= {"hidden_act": "gelu", "rope_parameters": {"rope_type": "spiral", "factor": 8}}
    raw |= {"layer_types": ["linear_attention"]}
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    message = str(caught.value)
    assert message.startswith("there/config.json: ")
    for part in ("vocab_size is missing", "num_hidden_layers is missing", "'spiral'", "'gelu'"):
        assert part in message
    assert "'linear_attention' is not supported" in message


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_has_its_window_in_the_layers_its_config_says(config, kind):
    raw = models.config_to_huggingface(replace(config, kind=kind, layers=4))
    raw |= {"use_sliding_window": True, "sliding_window": 9}

    def window(**changes):
        found = models.config_from_huggingface(raw | changes)
        return found.window, found.unwindowed

    windowed, full = "sliding_attention", "full_attention"
    assert window(layer_types=[full, windowed, full, windowed]) == (9, (0, 2))
    assert window(layer_types=[windowed] * 4) == (9, ())
    assert window(layer_types=[full] * 4) == (None, ())
    assert window(layer_types=[windowed] * 4, use_sliding_window=False) == (None, ())
    assert window(layer_types=None, max_window_layers=1) == (9, (0,))
    del raw["layer_types"], raw["max_window_layers"]  # by default the first 28 layers are without
    assert window() == (None, ())
    assert window(num_hidden_layers=30) == (9, tuple(range(28)))
    with pytest.raises(InputError, match="layer_types has 3 layers, not 4"):
        window(layer_types=[full] * 3)


def test_mistral_without_a_word_on_its_window_has_its_default(config):
    raw = models.config_to_huggingface(replace(config, kind="mistral"))
    assert models.config_from_huggingface(raw).window is None
    del raw["sliding_window"]
    assert models.config_from_huggingface(raw).window == 4096


# What the models' own cards and config.json say.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
REAL = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "sliding_window": None,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_their_size_and_run_in_shape(name):
    parameters, raw = REAL[name]
    real = models.config_from_huggingface(raw)
    weights = table.abstract(models.table(real), jnp.bfloat16)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) == parameters
    tokens = jax.ShapeDtypeStruct((1, 5000), jnp.int32)
    run = lambda weights, tokens: models.forward(real, weights, {}, tokens).hidden  # noqa: E731
    states = jax.eval_shape(run, weights, tokens)
    assert (states.shape, states.dtype) == ((1, 5000, real.width), jnp.bfloat16)

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, table
from lora_jax.errors import InputError
from lora_jax.families import llama, phi3
from lora_jax.modules import IA3, LoRA
from lora_jax.rope import Rope

SHORT, LONG = (1.0, 1.1), (2.0, 9.0)


@pytest.fixture(scope="module")
def config() -> phi3.Config:
    """A Phi-3 of two layers whose heads turn by half, scaled from 8 positions on."""
    return phi3.Config(
        vocabulary=256,
        width=32,
        hidden=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        context=64,
        rope=Rope(4, 100.0, "longrope", context=8, attention=1.2, short=SHORT, long=LONG),
    )


@pytest.fixture(scope="module")
def weights(config, random_weights):
    return random_weights(config)


@pytest.fixture(scope="module")
def fused(config, random_lora):
    """A LoRA of every fused projection."""
    return random_lora(config, targets=["all-linear"])


def apart(config, weights):
    """The same model as a Llama, its fused kernels split."""
    sizes = [config.heads * 8, (config.heads + config.kv_heads) * 8]
    layers = dict(weights["layers"])
    qkv = jnp.split(layers.pop("self_attn.qkv_proj"), sizes, axis=-1)
    up = jnp.split(layers.pop("mlp.gate_up_proj"), 2, axis=-1)
    layers |= {f"self_attn.{p}_proj": kernel for p, kernel in zip("qkv", qkv, strict=True)}
    layers |= {f"mlp.{p}_proj": kernel for p, kernel in zip(("gate", "up"), up, strict=True)}
    return llama.Config(kind="llama", **vars(config)), {**weights, "layers": layers}


def test_it_is_a_llama_whose_projections_are_fused(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 12)
    split, parts = apart(config, weights)
    np.testing.assert_allclose(
        hidden(config, weights, {}, tokens), hidden(split, parts, {}, tokens), atol=1e-5
    )


def test_a_fused_lora_is_its_merged_kernel(config, weights, fused, hidden, random_tokens):
    tokens = random_tokens(2, 6)
    layers = dict(weights["layers"])
    for path, module in fused.items():
        layers[path] = layers[path] + module.scale * module.a @ module.b
    merged = {**weights, "layers": layers}
    found = hidden(config, weights, fused, tokens)
    np.testing.assert_allclose(found, hidden(config, merged, {}, tokens), atol=5e-5)
    assert not np.allclose(found, hidden(config, weights, {}, tokens), atol=0.1)


def test_modules_go_to_the_fused_projections(config, random_ia3):
    assert models.default_targets(config) == ("self_attn.qkv_proj", "self_attn.o_proj")
    assert models.projections(config) == {
        "self_attn.qkv_proj": (2, 32, 64),
        "self_attn.o_proj": (2, 32, 32),
        "mlp.gate_up_proj": (2, 32, 96),
        "mlp.down_proj": (2, 48, 32),
    }
    sizes = {path: (m.on, m.offset.shape) for path, m in random_ia3(config).items()}
    assert sizes == {
        "self_attn.qkv_proj": ("output", (2, 64)),
        "mlp.down_proj": ("input", (2, 48)),
    }


def test_pefts_ia3_layout_is_llamas_where_it_leaves_the_queries(
    config, weights, hidden, random_ia3, random_tokens
):
    ia3, queries = random_ia3(config), config.heads * 8
    offset = ia3["self_attn.qkv_proj"].offset.at[:, :queries].set(0)
    _, k, v = jnp.split(offset, [queries, queries + config.kv_heads * 8], axis=-1)
    split, parts = apart(config, weights)
    same = {"self_attn.k_proj": IA3(k), "self_attn.v_proj": IA3(v)}
    same["mlp.down_proj"] = ia3["mlp.down_proj"]
    tokens = random_tokens(2, 6)
    here = hidden(config, weights, {**ia3, "self_attn.qkv_proj": IA3(offset)}, tokens)
    np.testing.assert_allclose(here, hidden(split, parts, same, tokens), atol=1e-5)
    assert not np.allclose(here, hidden(config, weights, {}, tokens), atol=0.1)


def test_a_text_takes_its_factors_by_its_length_whatever_is_beside_it(
    config, weights, fused, hidden, random_tokens
):
    """Texts of 6 and 11 tokens, within and beyond the context of 8, packed, padded and alone."""
    short, long = random_tokens(1, 6), random_tokens(1, 11, seed=1)
    alone = jnp.concatenate([hidden(config, weights, fused, t) for t in (short, long)], 1)
    packed = jnp.concatenate([short, long], 1)
    segments = jnp.array([[1] * 6 + [2] * 11])
    positions = jnp.concatenate([jnp.arange(6), jnp.arange(11)])[None]
    options = {"segments": segments, "positions": positions}
    np.testing.assert_allclose(hidden(config, weights, fused, packed, **options), alone, atol=2e-5)
    padded = jnp.concatenate([jnp.pad(short, ((0, 0), (0, 5))), long])
    real = jnp.arange(11) < jnp.array([[6], [11]])
    states = hidden(config, weights, fused, padded, segments=real.astype(jnp.int32))
    np.testing.assert_allclose(states[real][None], alone, atol=2e-5)

    never = replace(config, rope=replace(config.rope, long=SHORT))
    assert not np.allclose(hidden(never, weights, fused, long), alone[:, 6:], atol=0.01)


def test_a_config_round_trips_through_json(config):
    plain = replace(config, rope=Rope(8), tied=True, window=9, eps=1e-6)
    for one in (config, plain):
        raw = json.loads(json.dumps(models.config_to_huggingface(one)))
        assert models.config_from_huggingface(raw) == one
        assert hash(models.config_from_huggingface(raw)) == hash(one)


def test_early_names_of_longrope_are_known_and_other_things_refused(config):
    raw = models.config_to_huggingface(config)
    given = raw.pop("rope_parameters")
    for name in ("su", "yarn", "longrope"):
        old = {"type": name, **{key: given[key] for key in ("short_factor", "long_factor")}}
        old = raw | {"rope_scaling": old, "rope_theta": 100.0, "partial_rotary_factor": 0.5}
        found = models.config_from_huggingface(old).rope
        factor = math.sqrt(1 + math.log(64 / 8) / math.log(8))
        assert found == replace(config.rope, attention=factor)
    bad = raw | {"rope_scaling": {"type": "mrope"}, "hidden_act": "gelu"}
    del bad["vocab_size"]
    with pytest.raises(InputError, match=r"vocab_size is missing.*'gelu'.*'mrope'"):
        models.config_from_huggingface(bad)


MINI_4K = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MINI_35 = MINI_4K | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", **FACTORS},
    "sliding_window": 262144,
}
PHI4_MINI = MINI_35 | {
    "vocab_size": 200064,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [(MINI_35, 3_821_079_552), (PHI4_MINI, 3_836_021_760)],
)
def test_real_models_have_their_size_and_run_in_shape(raw, parameters):
    real = models.config_from_huggingface(raw)
    weights = table.abstract(models.table(real), jnp.bfloat16)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights)) == parameters
    adapter = {
        path: LoRA(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, i, 4), (n, 4, o))), 4.0)
        for path, (n, i, o) in models.projections(real).items()
        if path in models.default_targets(real)
    }
    tokens = jax.ShapeDtypeStruct((1, 5000), jnp.int32)
    run = lambda *given: models.forward(real, *given).hidden  # noqa: E731
    states = jax.eval_shape(run, weights, adapter, tokens)
    assert (states.shape, states.dtype) == ((1, 5000, 3072), jnp.bfloat16)

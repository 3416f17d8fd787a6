from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, modules
from lora_jax.errors import InputError
from lora_jax.families import phi
from lora_jax.rope import Rope


@pytest.fixture(scope="module")
def config():
    return phi.Config(264, 32, 64, layers=2, heads=4, kv_heads=4, context=32, rope=Rope(4))


@pytest.fixture(scope="module")
def weights(config, random_weights):
    return random_weights(config)


def test_only_relative_positions_count(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 7)
    shifted = hidden(config, weights, {}, tokens, positions=jnp.arange(3, 10)[None])
    plain = hidden(config, weights, {}, tokens, positions=jnp.arange(7)[None])
    np.testing.assert_allclose(shifted, plain, atol=2e-5)
    spread = hidden(config, weights, {}, tokens, positions=2 * jnp.arange(7)[None])
    assert not np.allclose(spread, plain, atol=1e-2)


def test_positions_turn_a_heads_first_numbers_alone(config, weights, hidden, random_tokens):
    """With no kernel for those, positions no longer count."""
    layers, tokens = dict(weights["layers"]), random_tokens(1, 7)
    turned = np.arange(config.width) % config.head_width < config.rope.width
    for name in ("self_attn.q_proj", "self_attn.q_proj.bias"):
        layers[name] = jnp.where(turned, 0, layers[name])
    less = {**weights, "layers": layers}
    near, far = (
        hidden(config, less, {}, tokens, positions=apart * jnp.arange(7)[None]) for apart in (1, 2)
    )
    np.testing.assert_allclose(near, far, atol=1e-6)


def test_attention_and_feed_forward_read_the_same(config, weights, random_tokens):
    look = lambda path, module, x: x  # noqa: E731
    seen = models.forward(config, weights, {}, random_tokens(1, 6), observe=look).observed
    for path in ("self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
        assert (seen[path] == seen["self_attn.q_proj"]).all()


def test_the_unembedding_has_a_bias(config, weights):
    states = jnp.ones((2, config.width))
    for one in (config, replace(config, tied=True)):
        kernel = weights["embed"].T if one.tied else weights["unembed"]
        held = {k: w for k, w in weights.items() if k != "unembed" or not one.tied}
        np.testing.assert_allclose(
            models.unembed(one, held, {}, states),
            states @ kernel + weights["unembed.bias"],
            rtol=1e-5,
        )


def test_queries_and_keys_are_normed_head_by_head(config, random_weights, hidden, random_tokens):
    """So a head's queries may grow at will."""
    normed = replace(config, qk_norm=True)
    weights, tokens = random_weights(normed), random_tokens(1, 6)
    layers = dict(weights["layers"])
    for name in ("self_attn.q_proj", "self_attn.q_proj.bias"):
        layers[name] = layers[name].at[..., 8:16].multiply(50)
    grown = {**weights, "layers": layers}
    plain = hidden(normed, weights, {}, tokens)
    np.testing.assert_allclose(hidden(normed, grown, {}, tokens), plain, atol=1e-3)
    free = {n: w for n, w in weights["layers"].items() if "_layernorm" not in n[9:]}
    assert not np.allclose(hidden(config, {**weights, "layers": free}, {}, tokens), plain, atol=0.1)


def test_modules_go_where_peft_and_pem_put_them(config):
    sizes = models.projections(config)
    lora = modules.init_lora(
        jax.random.key(0), sizes, targets=models.default_targets(config), rank=2, alpha=1
    )
    assert [path.rsplit(".")[-1] for path in lora] == ["q_proj", "k_proj", "v_proj", "dense"]
    peft, pem = (modules.init_ia3(sizes, models.ia3_layouts(config)[k]) for k in ("peft", "pem"))
    assert {path: (m.on, m.offset.shape) for path, m in peft.items()} == {
        "self_attn.q_proj": ("output", (2, 32)),
        "self_attn.v_proj": ("output", (2, 32)),
        "mlp.fc2": ("input", (2, 64)),
    }
    assert {path: m.on for path, m in pem.items()} == dict.fromkeys(
        ["self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], "output"
    )


RAW = {
    "model_type": "phi",
    "vocab_size": 9,
    "hidden_size": 16,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_what_a_config_leaves_unsaid_is_as_transformers_has_it():
    want = phi.Config(9, 16, 5, 1, 2, 2, 2048, Rope(4), "gelu_new", 1e-5, False, False)
    assert models.config_from_huggingface(RAW) == want


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e4, "partial_rotary_factor": 0.75},
        {"rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 0.75}},
    ],
)
def test_rotary_positions_are_read_in_both_forms(given):
    assert models.config_from_huggingface(RAW | given).rope == Rope(6, 5e4)


def test_what_a_config_asks_in_vain_is_told_at_once():
    raw = RAW | {"hidden_act": "mish", "rope_scaling": {"type": "odd"}, "num_attention_heads": 3}
    del raw["vocab_size"]
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    message = str(caught.value)
    assert message.startswith("there/config.json: ")
    for part in ("vocab_size is missing", "'mish'", "'odd'", "16 does not divide into 3 heads"):
        assert part in message

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.project import Dropout


def reach(config, weights, at, length):
    """For each of `length` distinct tokens, how strongly the hidden state `at` depends on it."""

    @jax.jit
    @jax.grad
    def gradient(embed):
        tokens = jnp.arange(length)[None]
        return models.forward(config, {**weights, "embed": embed}, {}, tokens).hidden[0, at].sum()

    return np.abs(gradient(weights["embed"])).sum(-1)[:length]


def test_a_window_reaches_back_once_a_layer(config, random_weights):
    windowed = replace(config, window=3, layers=1)
    strength = reach(windowed, random_weights(windowed), at=6, length=9)
    assert ((strength > 0) == ((np.arange(9) >= 4) & (np.arange(9) <= 6))).all()
    windowed = replace(config, window=3, layers=2)
    strength = reach(windowed, random_weights(windowed), at=6, length=9)
    assert ((strength > 0) == ((np.arange(9) >= 2) & (np.arange(9) <= 6))).all()


def test_only_relative_positions_count(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 7)
    shifted = hidden(config, weights, {}, tokens, positions=jnp.arange(7)[None] + jnp.array([[3]]))
    np.testing.assert_allclose(shifted, hidden(config, weights, {}, tokens), atol=2e-5)
    spread = hidden(config, weights, {}, tokens, positions=2 * jnp.arange(7)[None])
    assert not np.allclose(spread, shifted, atol=1e-2)


def test_rematerialising_changes_no_state_and_no_gradient(
    config, weights, random_lora, random_tokens
):
    adapter, tokens = random_lora(config), random_tokens(2, 6)

    def loss(adapter, remat):
        return jnp.sum(models.forward(config, weights, adapter, tokens, remat=remat).hidden ** 2)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, kept = (both(adapter, remat) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), plain, kept)


def test_observation_sees_every_projections_input_and_module_a_layer(
    config, weights, random_lora, random_tokens
):
    adapter, tokens = random_lora(config, targets=["q_proj"]), random_tokens(2, 6)
    modules_seen = {}

    def observe(path, module, x):
        modules_seen[path] = module is not None
        return {"input": x, "norm": jnp.linalg.norm(x)}

    seen = models.forward(config, weights, adapter, tokens, observe=observe).observed
    assert seen.keys() == models.projections(config).keys()
    assert [path for path, found in modules_seen.items() if found] == ["self_attn.q_proj"]
    for path, (_, size, _) in models.projections(config).items():
        assert seen[path]["input"].shape == (config.layers, 2, 6, size)
        assert seen[path]["norm"].shape == (config.layers,)
    embedded = weights["embed"][tokens]
    first = embedded / jnp.sqrt(jnp.mean(embedded**2, -1, keepdims=True) + config.eps)
    np.testing.assert_allclose(seen["self_attn.q_proj"]["input"][0], first, rtol=1e-4, atol=1e-5)


def test_an_observer_that_returns_nothing_leaves_nothing(config, weights, random_tokens):
    def observed(**options):
        run = lambda: models.forward(config, weights, {}, random_tokens(1, 3), **options)  # noqa: E731
        return jax.eval_shape(run).observed

    assert not jax.tree.leaves(observed(observe=lambda *_: None))
    assert observed() is None


def test_stacked_adapters_under_vmap_are_as_one_by_one(
    config, weights, hidden, random_lora, random_tokens
):
    adapters, tokens = [random_lora(config, seed) for seed in range(3)], random_tokens(2, 6)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *adapters)
    run = jax.vmap(lambda adapter: models.forward(config, weights, adapter, tokens).hidden)
    together = jax.jit(run)(stacked)
    for one, states in zip(adapters, together, strict=True):
        np.testing.assert_allclose(states, hidden(config, weights, one, tokens), atol=2e-5)


def test_a_new_adapter_is_the_base_and_a_random_one_is_not(
    config, weights, hidden, random_lora, random_tokens
):
    tokens = random_tokens(2, 6)
    fresh = {p: m.replace(b=0 * m.b) for p, m in random_lora(config).items()}
    base = hidden(config, weights, {}, tokens)
    np.testing.assert_allclose(hidden(config, weights, fresh, tokens), base, atol=1e-6)
    assert not np.allclose(hidden(config, weights, random_lora(config), tokens), base, atol=0.1)


@pytest.mark.parametrize("path", sorted(["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]))
def test_every_layer_and_projection_of_an_adapter_counts(
    config, weights, hidden, random_lora, random_tokens, path
):
    adapter, tokens = random_lora(config, targets=[path]), random_tokens(1, 6)
    full = hidden(config, weights, adapter, tokens)
    for layer in range(config.layers):
        less = {path: adapter[path].replace(b=adapter[path].b.at[layer].set(0))}
        assert not np.allclose(hidden(config, weights, less, tokens), full, atol=1e-3)


def test_a_module_without_a_place_is_refused(config, weights, random_lora, random_tokens):
    adapter = {"self_attn.qkv_proj": random_lora(config)["self_attn.q_proj"]}
    with pytest.raises(InputError, match=r"self_attn\.qkv_proj.*this model has self_attn\.q_proj"):
        models.forward(config, weights, adapter, random_tokens(1, 3))


def test_ia3_on_the_intermediate_is_the_same_on_either_side(
    config, weights, hidden, random_ia3, random_tokens
):
    """SwiGLU multiplies up_proj's output by the gate, so PEM's and PEFT's places are one."""
    peft = random_ia3(config, layout="peft")
    pem = {p: m for p, m in peft.items() if p != "mlp.down_proj"}
    pem["mlp.up_proj"] = peft["mlp.down_proj"].replace(on="output")
    tokens = random_tokens(2, 6)
    as_peft, as_pem = (hidden(config, weights, a, tokens) for a in (peft, pem))
    np.testing.assert_allclose(as_peft, as_pem, atol=2e-5)
    assert not np.allclose(as_peft, hidden(config, weights, {}, tokens), atol=0.1)


def test_dropout_depends_on_its_key_and_leaves_the_base_alone(
    config, weights, hidden, random_lora, random_tokens
):
    adapter, tokens = random_lora(config), random_tokens(2, 6)

    def states(adapter, seed, rate=0.5):
        dropout = Dropout(jax.random.key(seed), rate)
        return np.asarray(hidden(config, weights, adapter, tokens, dropout=dropout))

    assert (states(adapter, 0) == states(adapter, 0)).all()
    assert not np.allclose(states(adapter, 0), states(adapter, 1), atol=1e-2)
    none = hidden(config, weights, adapter, tokens)
    np.testing.assert_allclose(states(adapter, 0, rate=0.0), none, atol=1e-5)
    np.testing.assert_allclose(states({}, 0), hidden(config, weights, {}, tokens), atol=1e-5)


def test_float64_refines_float32(config, weights, hidden, random_tokens):
    tokens = random_tokens(2, 6)
    fine = hidden(config, weights, {}, tokens)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights)
        states = models.forward(config, wide, {}, tokens).hidden
        assert states.dtype == jnp.float64
        np.testing.assert_allclose(states, fine, atol=2e-5)


def test_biases_are_read_where_the_config_has_them(config, random_weights, hidden, random_tokens):
    biased = replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)
    weights, tokens = random_weights(biased), random_tokens(1, 6)
    full = hidden(biased, weights, {}, tokens)
    for path in models.projections(biased):
        layers = {**weights["layers"], f"{path}.bias": 0 * weights["layers"][f"{path}.bias"]}
        less = hidden(biased, {**weights, "layers": layers}, {}, tokens)
        # A bias on k adds the same to all scores of a query but for the rotation.
        assert not np.allclose(less, full, atol=1e-4), path


def test_a_free_unembedding_is_its_own_weight(config, random_weights):
    free = replace(config, tied=False)
    weights = random_weights(free)
    tied = {name: value for name, value in weights.items() if name != "unembed"}
    states = jnp.ones((2, config.width))
    np.testing.assert_allclose(
        models.unembed(free, weights, {}, states), states @ weights["unembed"], rtol=1e-5
    )
    np.testing.assert_allclose(
        models.unembed(config, tied, {}, states), states @ weights["embed"].T, rtol=1e-5
    )


def test_layers_without_the_window_see_farther(config, random_weights):
    """Three layers with a window of 2 reach 3 back in all; one of them without it, all the way."""
    windowed = replace(config, kind="qwen2", layers=3, window=2)
    weights = random_weights(windowed)
    for unwindowed, first in (((), 6), ((0,), 0), ((2,), 0)):
        mixed = replace(windowed, unwindowed=unwindowed)
        strength = reach(mixed, weights, at=9, length=10)
        assert np.flatnonzero(strength > 0).tolist() == list(range(first, 10))


def test_qwen3_norms_its_queries_and_keys(config, random_weights, hidden, random_tokens):
    """So their kernels' sizes count for nothing, and their gains for something."""
    normed = replace(config, kind="qwen3", qk_norm=True)
    weights, tokens = random_weights(normed), random_tokens(1, 6)
    states = hidden(normed, weights, {}, tokens)
    for name in ("q", "k"):
        kernel, gain = f"self_attn.{name}_proj", f"self_attn.{name}_norm"
        larger = {**weights["layers"], kernel: 5 * weights["layers"][kernel]}
        same = hidden(normed, {**weights, "layers": larger}, {}, tokens)
        np.testing.assert_allclose(same, states, atol=1e-3)
        sharper = {**weights["layers"], gain: 5 * weights["layers"][gain]}
        other = hidden(normed, {**weights, "layers": sharper}, {}, tokens)
        assert not np.allclose(other, states, atol=0.05)


def test_positions_count_a_shared_prefix(config, weights, hidden, random_tokens):
    tokens = random_tokens(1, 6)
    shared = hidden(config, weights, {}, tokens, segments=jnp.asarray([[-1] * 3 + [1] * 3]))
    np.testing.assert_allclose(shared, hidden(config, weights, {}, tokens), atol=2e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.arrow import applied, prototypes, route_library, routing_statistics
from compose.library import Library, Routing
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.project import project

UP = "mlp.up_proj"


@pytest.fixture(scope="module")
def library(lora) -> Library:
    """Three modules of unequal ranks and scales."""
    members = (lora(0, rank=2), lora(1, rank=4, scale=0.5), lora(2))
    members = tuple({UP: member[UP]} for member in members)
    return Library(("x", "y", "z"), members)


def test_prototypes_are_the_directions_amplified_most(lora, dense):
    m = lora()[UP]
    found = prototypes(m.a, m.b)
    u = np.linalg.svd(dense({UP: m})[UP])[0][:, :, 0]
    np.testing.assert_allclose(np.abs(np.sum(found * u, axis=-1)), 1, rtol=1e-5)
    assert np.all(np.asarray(found).max(-1) == np.abs(found).max(-1))


def test_an_untrained_module_attracts_no_token(lora):
    m = lora()[UP]
    assert not prototypes(m.a, jnp.zeros_like(m.b)).any()


def test_routed_leaves_have_the_layer_axis_in_front(library):
    routed = route_library(library, top_k=2)[UP]
    assert routed.a.shape == (2, 3, 5, 4) and routed.b.shape == (2, 3, 4, 9)
    assert routed.prototypes.shape == (2, 3, 5)
    assert (routed.top_k, routed.temperature, routed.mixing) == (2, 1.0, "outputs")


def test_padding_and_folding_leave_prototypes_alone(library):
    routed = route_library(library)[UP]
    for m, adapter in enumerate(library.adapters):
        alone = prototypes(adapter[UP].a, adapter[UP].b)
        np.testing.assert_allclose(routed.prototypes[:, m], alone, atol=1e-5)


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
def test_one_expert_routed_is_that_expert(lora, mixing):
    adapter = lora(paths=(UP,))
    routed = route_library(Library(("x",), (adapter,)), top_k=1, mixing=mixing)
    x, kernel = jax.random.normal(jax.random.key(0), (4, 5)), jnp.zeros((5, 9))
    first = jax.tree.map(lambda leaf: leaf[0], (routed[UP], adapter[UP]))
    found, want = (project(x, kernel, module=module) for module in first)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_must_fit_the_library(library, top_k):
    with pytest.raises(InputError, match=f"between 1 and the library's 3 modules; got {top_k}"):
        route_library(library, top_k=top_k)


def test_settings_that_make_no_sense_are_named(library):
    with pytest.raises(InputError, match="unknown mixing 'both'; choose outputs or factors"):
        route_library(library, mixing="both")
    with pytest.raises(InputError, match=r"temperature must be above 0; got 0"):
        route_library(library, temperature=0.0)


def test_ia3_is_not_routed(ia3):
    with pytest.raises(InputError, match=r"mlp\.up_proj: Arrow routes LoRA .* holds IA3"):
        route_library(Library(("x",), (ia3(),)), top_k=1)


def test_a_library_is_applied_as_its_settings_say(library, lora):
    routed = applied(library.replace(routing=Routing(2, 0.5, "factors")))
    assert (routed[UP].top_k, routed[UP].temperature, routed[UP].mixing) == (2, 0.5, "factors")
    alone = lora()
    assert applied(alone) is alone
    with pytest.raises(InputError, match="library of 3 modules is not one module"):
        applied(library)


@pytest.fixture(scope="module")
def routed(config, random_lora):
    """A routed adapter on the tiny model."""
    members = tuple(random_lora(config, seed, targets=("q_proj",)) for seed in range(3))
    return route_library(Library(("x", "y", "z"), members), top_k=2)


def test_statistics_are_shares_and_bounded_entropies(config, weights, routed, random_tokens):
    found = routing_statistics(config, weights, routed, random_tokens(2, 6))
    assert found.keys() == routed.keys()
    for one in found.values():
        assert one["share"].shape == (config.layers, 3) and one["entropy"].shape == (config.layers,)
        np.testing.assert_allclose(one["share"].sum(-1), 1, rtol=1e-5)
        assert np.all((one["relative_entropy"] >= 0) & (one["relative_entropy"] <= 1 + 1e-6))


def test_padding_does_not_count(config, weights, routed, random_tokens):
    tokens = random_tokens(2, 6)
    padded = jnp.pad(tokens, [(0, 0), (0, 3)], constant_values=9)
    segments = (jnp.arange(9) < 6).astype(jnp.int32) * jnp.ones((2, 1), jnp.int32)
    want = routing_statistics(config, weights, routed, tokens)
    found = routing_statistics(config, weights, routed, padded, segments)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5), found, want)


def test_what_is_not_routed_has_no_statistics(config, weights, random_lora, random_tokens):
    plain = random_lora(config)
    assert routing_statistics(config, weights, plain, random_tokens(1, 4)) == {}


def test_one_chosen_module_has_no_entropy(config, weights, routed, random_tokens):
    one = {path: module.replace(top_k=1) for path, module in routed.items()}
    found = routing_statistics(config, weights, one, random_tokens(1, 4))
    assert all(not stats["relative_entropy"].any() for stats in found.values())


def test_the_routed_model_compiles_and_differs_from_the_base(
    config, weights, routed, random_tokens
):
    forward = jax.jit(models.forward, static_argnums=0)
    tokens = random_tokens(1, 4)
    found = forward(config, weights, routed, tokens).hidden
    assert np.isfinite(found).all()
    assert np.abs(found - forward(config, weights, {}, tokens).hidden).max() > 1e-3

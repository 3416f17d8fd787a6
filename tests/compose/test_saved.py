"""Weights that modules keep whole, such as a classifier's head, through every composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.align import by_projection
from compose.arithmetic import analogy, average, negate, scale, subtract, weighted_sum
from compose.arrow import route_library
from compose.expression import evaluate
from compose.geometry import cosine, norm, recompress
from compose.library import Library, stack, unstack
from lora_jax.decoder import with_saved
from lora_jax.errors import InputError
from lora_jax.modules import Saved, describe

HEAD = "classifier.out_proj"
BASE = np.random.default_rng(9).standard_normal((7, 3)).astype(np.float32)
SPACES = ["delta", "factor"]


@pytest.fixture
def headed(lora):
    """A function to a LoRA adapter with a head of its own."""

    def make(seed):
        head = np.random.default_rng(seed).standard_normal(BASE.shape)
        return lora(seed) | {HEAD: Saved(jnp.asarray(head, jnp.float32))}

    return make


def head(adapter):
    """The head that a forward pass finds under an adapter."""
    weights, rest = with_saved({"embed": BASE, HEAD: jnp.asarray(BASE), "layers": {}}, adapter)
    assert not any(isinstance(module, Saved) for module in rest.values())
    return np.asarray(weights[HEAD], np.float64)


def away(adapter):
    """How far an adapter takes the head from the base's."""
    return head(adapter) - BASE


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_weights_that_add_up_to_one_average_heads_as_pem_does(headed, space, weight):
    a, b = headed(0), headed(1)
    both = weighted_sum([a, b], [weight, 1 - weight], space=space)
    wanted = weight * a[HEAD].value + (1 - weight) * b[HEAD].value
    assert both[HEAD].share is None
    np.testing.assert_allclose(both[HEAD].value, wanted, rtol=1e-6)
    if weight in (0.0, 1.0):
        np.testing.assert_array_equal(both[HEAD].value, (a if weight else b)[HEAD].value)


@pytest.mark.parametrize("space", SPACES)
def test_other_weights_move_the_head_from_the_bases_as_they_move_a_delta(headed, space):
    """W0 + Σ wᵢ (Wᵢ - W0): PEM's formulas for whole models."""
    a, b, c = (headed(seed) for seed in range(3))
    np.testing.assert_allclose(away(negate(a, 0.7)), -0.7 * away(a), atol=1e-5)
    np.testing.assert_allclose(away(scale(a, 0.3, space=space)), 0.3 * away(a), atol=1e-5)
    np.testing.assert_allclose(away(subtract(a, b, space=space)), away(a) - away(b), atol=1e-5)
    moved = analogy(a, b, c, 0.8, space=space)
    wanted = 0.8 * away(a) + 0.2 * (away(b) - away(c))
    np.testing.assert_allclose(away(moved), wanted, atol=1e-5)


def test_a_module_without_a_head_is_zero_at_it(headed, lora):
    a, plain = headed(0), lora(1)
    both = average([a, plain], space="delta")
    np.testing.assert_allclose(away(both), 0.5 * away(a), atol=1e-5)
    alone = weighted_sum([a, plain], [1.0, -0.4], space="delta")
    assert alone[HEAD].share is None
    np.testing.assert_array_equal(alone[HEAD].value, a[HEAD].value)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("text", ["0.2*a + 0.8*b", "(a + 4*b) / 5", "mean(a, b, b, b, b)"])
def test_expressions_average_heads_in_any_form(headed, space, text):
    a, b = headed(0), headed(1)
    found = evaluate(text, {"a": a, "b": b}, space=space)[HEAD]
    assert found.share is None
    np.testing.assert_allclose(found.value, 0.2 * a[HEAD].value + 0.8 * b[HEAD].value, rtol=1e-5)


def test_a_share_of_a_tied_unembedding_leaves_the_embedding_the_rest():
    half = {"unembed": Saved(jnp.ones((3, 7)), jnp.array(0.5))}
    weights, _ = with_saved(_weights(), half)
    np.testing.assert_allclose(weights["unembed"], 1 + 0.5 * BASE.T, rtol=1e-6)


def test_the_way_there_and_back_is_the_module(headed):
    a, b = headed(0), headed(1)
    found = evaluate("-(-(a - b)) + b", {"a": a, "b": b})[HEAD]
    assert found.share is None
    np.testing.assert_allclose(found.value, a[HEAD].value, atol=1e-6)


def test_mixing_weights_can_be_learned_through_a_head(headed):
    a, b = headed(0), headed(1)

    def error(weights):
        both = weighted_sum([a, b], weights, space="delta")
        return jnp.sum(with_saved(_weights(), both)[0][HEAD])

    slope = jax.jit(jax.grad(error))(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(slope, [away(a).sum(), away(b).sum()], rtol=1e-4)


def _weights():
    return {"embed": jnp.asarray(BASE), HEAD: jnp.asarray(BASE), "layers": {}}


def test_stacked_members_keep_their_heads(headed, lora):
    a, b, plain = headed(0), headed(1), lora(2)
    whole = stack([a, b])
    assert whole[HEAD].share is None and whole[HEAD].value.shape == (2, *BASE.shape)
    for one, back in zip([a, b], unstack(whole), strict=True):
        np.testing.assert_array_equal(one[HEAD].value, back[HEAD].value)
    mixed = stack([a, plain, scale(b, 0.5, space="delta")])
    found = jax.vmap(lambda adapter: with_saved(_weights(), adapter)[0][HEAD])(mixed)
    wanted = [away(a), 0 * away(a), 0.5 * away(b)]
    np.testing.assert_allclose(found - BASE, wanted, atol=1e-5)


def test_heads_of_unlike_labels_cannot_meet(headed):
    other = headed(1) | {HEAD: Saved(jnp.ones((7, 2)))}
    with pytest.raises(InputError, match=r"out_proj: cannot combine a whole weight \(7 x 2\)"):
        by_projection([headed(0), other])
    with pytest.raises(InputError, match="whole weight"):
        average([headed(0), other], space="delta")


def test_a_head_cannot_be_routed(headed):
    library = Library(("a", "b"), (headed(0), headed(1)))
    with pytest.raises(InputError, match=r"out_proj: Arrow routes LoRA modules.*Saved"):
        route_library(library, top_k=1)


def test_norms_and_cosines_leave_heads_out_and_recompression_keeps_them(headed, lora):
    np.testing.assert_allclose(norm(headed(0)), norm(lora(0)))
    np.testing.assert_allclose(cosine(headed(0), headed(1)), cosine(lora(0), lora(1)))
    small, errors = recompress(headed(0), 1)
    assert HEAD not in errors and small[HEAD] is not None
    np.testing.assert_array_equal(small[HEAD].value, headed(0)[HEAD].value)


def test_a_head_is_told_of(headed):
    text = describe(headed(0))
    assert text.startswith("LoRA of rank 3 on q_proj, up_proj with classifier.out_proj whole (")
    assert describe({HEAD: Saved(jnp.ones((7, 3)))}) == "classifier.out_proj whole (21 parameters)"

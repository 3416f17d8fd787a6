"""The laws of the algebra, in both spaces, at several ranks, layer counts and types."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose import arithmetic, geometry
from compose.align import pad_rank
from lora_jax.errors import InputError
from lora_jax.modules import IA3, DoRA, LoRA

UP = "mlp.up_proj"
SPACES = st.sampled_from(["delta", "factor"])
TYPES = st.sampled_from([jnp.float32, jnp.bfloat16])
SHAPES = st.sampled_from(  # few, because every new shape is compiled
    [
        {"rank": 1, "layers": 3, "dtype": jnp.float32},
        {"rank": 4, "layers": 1, "dtype": jnp.float32},
        {"rank": 4, "layers": 3, "dtype": jnp.bfloat16},
    ]
)
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=10, deadline=None)
spaces = pytest.mark.parametrize("space", ["delta", "factor"])


def same(x, y) -> bool:
    """Whether two adapters are equal: structure, static fields and every bit of every leaf."""
    same_form = jax.tree.structure(x) == jax.tree.structure(y)
    return same_form and all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))


def close(x: dict, y: dict, tolerance: float = 1e-5) -> bool:
    return x.keys() == y.keys() and all(
        np.allclose(x[p], y[p], rtol=tolerance, atol=tolerance) for p in x
    )


@few
@given(SEEDS, SHAPES, SPACES)
def test_a_module_plus_nothing_is_itself(lora, seed, shape, space):
    m = lora(seed, **shape)
    assert same(arithmetic.weighted_sum([m, {}], [1, 1], space=space), m)
    assert same(arithmetic.subtract(m, {}, space=space), m)


@few
@given(SEEDS, SHAPES, SPACES)
def test_one_module_at_weight_one_is_itself_bit_for_bit(lora, seed, shape, space):
    m = lora(seed, **shape)
    assert same(arithmetic.weighted_sum([m], [1], space=space), m)
    assert same(arithmetic.average([m], space=space), m)
    assert same(arithmetic.scale(m, 1.0, space=space), m)


@few
@given(SEEDS, SHAPES, SPACES)
def test_a_module_minus_itself_is_nothing(lora, dense, seed, shape, space):
    m = lora(seed, **shape)
    gone = arithmetic.subtract(m, m, space=space)
    assert all(np.all(np.abs(delta) < 1e-9) for delta in dense(gone).values())


@few
@given(SEEDS, SHAPES)
def test_negation_undoes_itself_bit_for_bit(lora, dense, seed, shape):
    m = lora(seed, **shape)
    assert same(arithmetic.negate(arithmetic.negate(m)), m)
    assert close(dense(arithmetic.negate(m)), {p: -d for p, d in dense(m).items()})


@few
@given(SEEDS, SEEDS, SHAPES)
def test_a_factor_sweep_ends_at_the_single_modules_bit_for_bit(lora, s, t, shape):
    x, y = lora(s, **shape), lora(t, **shape)
    assert same(arithmetic.average([x, y], [1.0, 0.0], space="factor"), x)
    assert same(arithmetic.average([x, y], [0.0, 1.0], space="factor"), y)


@few
@given(SEEDS, SEEDS, SHAPES)
def test_a_delta_sweep_ends_at_the_single_modules_bit_for_bit(lora, dense, s, t, shape):
    x, y = lora(s, **shape), lora(t, **shape)
    end = arithmetic.average([x, y], [1.0, 0.0], space="delta")
    rank = shape["rank"]
    for path, module in end.items():
        kept = LoRA(module.a[..., :rank], module.b[..., :rank, :], module.scale)
        assert same(kept, x[path])
        assert not module.b[..., rank:, :].any()


@few
@given(SEEDS, SEEDS, SHAPES, SPACES, st.floats(-2, 2), st.floats(-2, 2))
def test_order_does_not_matter(lora, dense, s, t, shape, space, v, w):
    x, y = lora(s, **shape), lora(t, **shape)
    one = arithmetic.weighted_sum([x, y], [v, w], space=space)
    other = arithmetic.weighted_sum([y, x], [w, v], space=space)
    assert close(dense(one), dense(other))


@few
@given(SEEDS, SEEDS, SHAPES, SPACES)
def test_padding_ranks_changes_nothing(lora, dense, s, t, shape, space):
    x, y = lora(s, **shape), lora(t, **shape)
    padded = {path: pad_rank(module, 6) for path, module in x.items()}
    one = arithmetic.weighted_sum([x, y], [0.3, -0.7], space=space)
    other = arithmetic.weighted_sum([padded, y], [0.3, -0.7], space=space)
    assert close(dense(one), dense(other))


@few
@given(SEEDS, SEEDS, st.floats(-2, 2), st.floats(-2, 2))
def test_delta_sums_are_sums_of_deltas(lora, dense, s, t, v, w):
    x, y = lora(s, rank=2, scale=0.5), lora(t, rank=4, scale=3.0)
    found = dense(arithmetic.weighted_sum([x, y], [v, w], space="delta"))
    want = {p: v * dense(x)[p] + w * dense(y)[p] for p in found}
    assert close(found, want, 1e-4)


@few
@given(SEEDS, TYPES)
def test_ia3_is_negated_as_the_paper_does_and_twice_is_nothing(ia3, seed, dtype):
    m = ia3(seed, dtype=dtype)
    flipped = arithmetic.negate(m)
    offset, found = (np.asarray(x[UP].offset, np.float64) for x in (m, flipped))
    np.testing.assert_allclose(1 + found, 2 - (1 + offset), rtol=1e-12)
    assert same(arithmetic.negate(flipped), m)


@few
@given(SEEDS, SEEDS, st.floats(0, 1))
def test_ia3_is_the_same_in_both_spaces(ia3, s, t, weight):
    x, y = ia3(s), ia3(t)
    found = [arithmetic.analogy(x, y, x, weight, space=space) for space in ("delta", "factor")]
    assert same(*found)
    # PEM: l = (1-λ)·1 + λ l₁ + (1-λ) l₂ - (1-λ) l₃
    l1, l2, l3 = (1 + np.asarray(m[UP].offset) for m in (x, y, x))
    want = (1 - weight) + weight * l1 + (1 - weight) * l2 - (1 - weight) * l3
    np.testing.assert_allclose(1 + found[0][UP].offset, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_scaled_negation_scales_the_delta_once(lora, ia3, dense, strength):
    for m in (lora(), ia3()):
        want = {p: -strength * d for p, d in dense(m).items()}
        assert close(dense(arithmetic.negate(m, strength)), want)


def test_negating_both_factors_is_a_no_op(lora, dense):
    m = lora()
    both = arithmetic.factor_sum([m], [-1.0], sign="ab")
    assert close(dense(both), dense(m))


def test_the_factor_average_is_the_papers(lora):
    x, y = lora(0), lora(1)
    found = arithmetic.average([x, y], [3.0, 1.0], space="factor")[UP]
    np.testing.assert_allclose(found.a, 0.75 * x[UP].a + 0.25 * y[UP].a, rtol=1e-6)
    np.testing.assert_allclose(found.b, 0.75 * x[UP].b + 0.25 * y[UP].b, rtol=1e-6)
    assert found.scale == x[UP].scale


def test_factor_scaling_weighs_each_tensor(lora, dense):
    m = lora()
    half = arithmetic.scale(m, 0.5, space="factor")
    assert close(dense(half), {p: 0.25 * d for p, d in dense(m).items()})
    flipped = arithmetic.scale(m, -0.5, space="factor")
    assert close(dense(flipped), {p: -0.25 * d for p, d in dense(m).items()})


def test_the_factor_difference_adds_the_as(lora):
    x, y = lora(0), lora(1)
    found = arithmetic.subtract(x, y, space="factor")[UP]
    np.testing.assert_array_equal(found.a, x[UP].a + y[UP].a)
    np.testing.assert_array_equal(found.b, x[UP].b - y[UP].b)


def test_the_analogy_is_the_papers(lora, dense):
    task, target, source = (lora(seed) for seed in range(3))
    found = arithmetic.analogy(task, target, source, 0.9, space="factor")[UP]
    one, two, three = (m[UP] for m in (task, target, source))
    np.testing.assert_allclose(found.a, 0.9 * one.a + 0.1 * two.a + 0.1 * three.a, atol=1e-6)
    np.testing.assert_allclose(found.b, 0.9 * one.b + 0.1 * two.b - 0.1 * three.b, atol=1e-6)
    exact = dense(arithmetic.analogy(task, target, source, 0.9, space="delta"))
    d = [dense(m)[UP] for m in (task, target, source)]
    np.testing.assert_allclose(exact[UP], 0.9 * d[0] + 0.1 * (d[1] - d[2]), atol=1e-5)


def test_the_alpaca_formula_negates_a(lora, dense):
    alpaca, toxic, c = lora(0), lora(1), 0.3
    found = arithmetic.detox(alpaca, toxic, c, space="factor")[UP]
    x, y = alpaca[UP], toxic[UP]
    np.testing.assert_allclose(found.a, x.a + c * (x.a - y.a), atol=1e-6)
    np.testing.assert_allclose(found.b, x.b + c * (x.b + y.b), atol=1e-6)
    exact = dense(arithmetic.detox(alpaca, toxic, c, space="delta"))[UP]
    want = dense(alpaca)[UP] + c * (dense(alpaca)[UP] - dense(toxic)[UP])
    np.testing.assert_allclose(exact, want, atol=1e-5)


def test_unequal_scales_meet_in_b(lora):
    x, y = lora(0, scale=2.0), lora(1, scale=0.5)
    found = arithmetic.weighted_sum([x, y], [1, 1], space="factor")[UP]
    assert found.scale == 1
    np.testing.assert_allclose(found.a, x[UP].a + y[UP].a, rtol=1e-6)
    np.testing.assert_allclose(found.b, 2 * x[UP].b + 0.5 * y[UP].b, rtol=1e-6)


@spaces
def test_a_missing_projection_is_the_zero_module(lora, dense, space):
    whole, part = lora(0), lora(1, paths=(UP,))
    found = dense(arithmetic.weighted_sum([whole, part], [1, 1], space=space))
    np.testing.assert_allclose(found["self_attn.q_proj"], dense(whole)["self_attn.q_proj"])


@spaces
def test_weights_can_be_learned_by_gradient(lora, space):
    x, y = lora(0), lora(1)

    @jax.jit
    @jax.grad
    def gradient(weights):
        m = arithmetic.average([x, y], weights, space=space)[UP]
        return jnp.sum((m.a @ m.b) ** 2)

    found = gradient(jnp.array([0.3, 0.7]))
    assert np.isfinite(found).all() and (found != 0).all()


@spaces
def test_a_sweep_of_weights_is_one_vmapped_call(lora, space):
    x, y = lora(0), lora(1)
    sweep = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    library = jax.vmap(lambda w: arithmetic.weighted_sum([x, y], w, space=space))(sweep)
    middle = arithmetic.weighted_sum([x, y], [0.5, 0.5], space=space)
    jax.tree.map(lambda m, w: np.testing.assert_allclose(m[1], w, rtol=1e-6), library, middle)


def test_float16_in_float16_out(lora):
    m = lora(dtype=jnp.float16)
    for space in ("delta", "factor"):
        total = arithmetic.weighted_sum([m, m], jnp.array([0.5, 0.5]), space=space)
        assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype(jnp.float16)}


def test_a_sweep_moves_monotonically_between_its_ends(lora, dense):
    x, y = lora(0), lora(1)
    far = [
        np.linalg.norm(
            dense(arithmetic.average([x, y], [w, 1 - w], space="delta"))[UP] - dense(x)[UP]
        )
        for w in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert all(a > b for a, b in pairwise(far))


def test_bad_input_is_named(lora, ia3):
    with pytest.raises(InputError, match="2 modules need as many weights; got 1"):
        arithmetic.weighted_sum([lora(), lora()], [1], space="delta")
    with pytest.raises(InputError, match="unknown space 'matrix'"):
        arithmetic.weighted_sum([lora()], [1], space="matrix")
    with pytest.raises(InputError, match="cannot combine IA3"):
        arithmetic.subtract(lora(), ia3(), space="factor")
    with pytest.raises(InputError, match="average of no modules"):
        arithmetic.average([], space="delta")


def test_ia3_and_lora_live_side_by_side_on_other_projections(lora, ia3):
    found = arithmetic.weighted_sum(
        [lora(paths=("self_attn.q_proj",)), ia3()], [1, 1], space="factor"
    )
    assert isinstance(found[UP], IA3) and isinstance(found["self_attn.q_proj"], LoRA)


def test_what_no_sum_can_hold_is_named_with_what_to_do(lora):
    plain, m = lora(paths=[UP]), lora()[UP]
    dora = {UP: DoRA(m.a, m.b, jnp.ones((2, 9)), 2.0)}
    other = {UP: DoRA(m.a[..., :1], m.b[:, :1], jnp.ones((2, 9)), 1.0)}
    biased = {UP: m.replace(bias=jnp.ones((2, 9)))}
    for adapters, reason in (
        ([dora, plain], r"depends on the base's columns .* merge it into the base \(--merged\)"),
        ([dora, other], r"depends on the base's columns .* or combine plain LoRA"),
        ([biased, biased], r"lora_bias cannot be combined; merge it \(--merged\)"),
    ):
        with pytest.raises(InputError, match=rf"mlp\.up_proj: .*{reason}"):
            arithmetic.weighted_sum(adapters, [1.0, 1.0], space="delta")
    with pytest.raises(InputError, match="it has no norm alone"):
        geometry.norm(dora)
    with pytest.raises(InputError, match="it has no inner product"):
        geometry.inner(dora, dora)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose import lowrank
from lora_jax.errors import InputError
from lora_jax.modules import LoRA

SHAPES = st.sampled_from([(1, 2), (3, 1), (8, 2)])  # rank and layers; 7 x 6 has at most rank 6
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=8, deadline=None)


def module(seed, rank=3, layers=2, scale=-1.5, dtype=jnp.float32) -> LoRA:
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((layers, 7, rank)), random.standard_normal((layers, rank, 6))
    return LoRA(jnp.asarray(a, dtype), jnp.asarray(b, dtype), scale)


def delta(m: LoRA) -> np.ndarray:
    return m.scale * np.asarray(m.a, np.float64) @ np.asarray(m.b, np.float64)


@few
@given(SEEDS, SEEDS, SHAPES)
def test_inner_and_norm_are_those_of_the_deltas(s, t, shape):
    x, y = module(s, *shape), module(t, 3, shape[1], scale=0.5)
    want = np.sum(delta(x) * delta(y), axis=(1, 2))
    sizes = np.linalg.norm(delta(x), axis=(1, 2)), np.linalg.norm(delta(y), axis=(1, 2))
    np.testing.assert_allclose(lowrank.inner(x, y), want, atol=2e-6 * np.max(sizes[0] * sizes[1]))
    np.testing.assert_allclose(lowrank.norm(x), sizes[0], rtol=1e-5)


@few
@given(SEEDS, SHAPES)
def test_svd_is_that_of_the_delta(seed, shape):
    rank, layers = shape
    m = module(seed, rank, layers, dtype=jnp.bfloat16 if rank == 3 else jnp.float32)
    u, s, vt = lowrank.svd(m)
    count = min(rank, 6)
    assert (u.shape, s.shape, vt.shape) == ((layers, 7, count), (layers, count), (layers, count, 6))
    np.testing.assert_allclose((u * s[:, None]) @ vt, delta(m), atol=1e-4)
    np.testing.assert_allclose(
        u.mT @ u, np.broadcast_to(np.eye(count), (layers, count, count)), atol=1e-5
    )
    assert np.all(np.diff(s, axis=-1) <= 0)


def test_the_sign_of_a_singular_vector_is_fixed():
    u, _, _ = lowrank.svd(module(0))
    peaks = np.take_along_axis(np.asarray(u), np.abs(u).argmax(1, keepdims=True), 1)
    assert np.all(peaks > 0)


@few
@given(SEEDS, st.sampled_from([1, 4]))
def test_recompression_is_the_best_of_its_rank_and_tells_its_error(seed, target):
    m = module(seed, 8)
    small, error = lowrank.recompress(m, target)
    s = np.linalg.svd(delta(m), compute_uv=False)
    best = np.sqrt((s[:, target:] ** 2).sum(1) / (s**2).sum(1))
    found = np.linalg.norm(delta(m) - delta(small), axis=(1, 2)) / np.linalg.norm(
        delta(m), axis=(1, 2)
    )
    assert small.a.shape[-1] <= target
    np.testing.assert_allclose(error, best, atol=1e-5)
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_a_module_that_is_small_enough_comes_back_as_it_is():
    m = module(0, rank=3)
    small, error = lowrank.recompress(m, 3)
    assert small is m
    assert not error.any()


def test_recompression_keeps_a_bias():
    m = module(0, rank=4)
    small, _ = lowrank.recompress(m.replace(bias=jnp.ones(m.b.shape[::2])), 1)
    assert small.scale == 1 and np.allclose(small.bias, m.scale)


def test_recompressing_a_sum_finds_its_own_rank():
    x = module(0, rank=2)
    twice = lowrank.concat([x, x])
    small, error = lowrank.recompress(twice, 2)
    np.testing.assert_allclose(delta(small), 2 * delta(x), rtol=1e-4, atol=1e-4)
    assert np.all(error < 1e-6)


def test_a_zero_delta_has_no_error_and_no_norm():
    zero = LoRA(jnp.ones((1, 7, 3)), jnp.zeros((1, 3, 6)))
    small, error = lowrank.recompress(zero, 1)
    assert error == 0 and lowrank.norm(zero) == 0 and not small.b.any()


def test_concatenation_adds_deltas_and_ranks():
    x, y = module(0, rank=2), module(1, rank=5, scale=0.25)
    both = lowrank.concat([x, y])
    assert both.a.shape[-1] == 7
    np.testing.assert_allclose(delta(both), delta(x) + delta(y), rtol=1e-5, atol=1e-5)


def test_the_norm_of_what_cancels_is_zero_and_not_rounding():
    x = module(0)
    gone = lowrank.concat([x, x.replace(b=-x.b)])
    assert np.all(lowrank.norm(gone) < 1e-5 * lowrank.norm(x))


def test_the_algebra_runs_under_jit_and_vmap():
    library = jax.tree.map(lambda *x: jnp.stack(x), module(0), module(1))
    norms = jax.jit(jax.vmap(lowrank.norm))(library)
    want = jnp.stack([lowrank.norm(module(0)), lowrank.norm(module(1))])
    np.testing.assert_allclose(norms, want, rtol=1e-5)


def test_no_array_of_input_by_output_size_is_formed():
    wide = LoRA(jnp.zeros((300, 2)), jnp.zeros((2, 500)))

    def work(m: LoRA):
        return lowrank.recompress(m, 1), lowrank.norm(m), lowrank.inner(m, m)

    text = str(jax.make_jaxpr(work)(wide))
    assert "500,2]" in text
    assert not any(size in text for size in ("300,500]", "500,300]", "300,300]", "500,500]"))


def test_rank_below_one_is_refused():
    with pytest.raises(InputError, match="at least 1; got 0"):
        lowrank.recompress(module(0), 0)


def test_accelerators_decompose_all_matrices_at_once():
    m = module(0)
    program = jax.jit(lambda a, b: lowrank.svd(LoRA(a, b))).trace(m.a, m.b)
    for platform, looped in (("cpu", True), ("cuda", False)):
        text = program.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == looped


@pytest.mark.slow
def test_many_decompositions_at_once_do_not_wait_for_each_other(run_on_devices):
    code = """
import jax, jax.numpy as jnp
from compose import lowrank
from lora_jax.modules import LoRA
a, b = jnp.ones((30, 576, 16)), jnp.ones((30, 16, 576))
many = jax.jit(lambda a: [lowrank.svd(LoRA(a + n, b))[1] for n in range(4)])
print(sum(float(s.sum()) > 0 for s in many(a)))
"""
    assert run_on_devices(code, devices=1).strip() == "4"

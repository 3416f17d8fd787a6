import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging import magnitude

KINDS = {
    "normal": lambda x: x,
    "many zeros": lambda x: np.where(x < 0.5, 0, x),
    "all equal": lambda x: np.full_like(x, -2.5),
    "few values": lambda x: np.round(2 * x),
    "forty orders": lambda x: np.exp(10 * x),
    "infinite": lambda x: np.where(x > 1, np.inf, x),
}
floor = jax.jit(magnitude.floor)


@pytest.mark.parametrize("size", [5, magnitude.SAMPLE + 1, 70_001])
@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_reached_by_the_k_largest(kind, size):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    x = KINDS[kind](x).astype(np.float32)
    ordered = np.sort(np.abs(x))
    assert floor(x, 0) == np.inf
    for k in (1, 2, size // 3, size - 1, size):
        assert np.sum(np.abs(x) >= floor(x, k)) == np.sum(np.abs(x) >= ordered[size - k])


def test_it_vmaps_over_tensors_and_counts():
    xs = jax.random.normal(jax.random.key(0), (3, 4000))
    found = jax.vmap(magnitude.floor)(xs, jnp.array([10, 2000, 3999]))
    reached = jnp.sum(jnp.abs(xs) >= found[:, None], axis=1)
    np.testing.assert_array_equal(reached, [10, 2000, 3999])


def test_half_precision_is_ordered_alike():
    x = jax.random.normal(jax.random.key(0), (4000,), jnp.bfloat16)
    wanted = np.sort(np.abs(np.asarray(x, np.float32)))[-1000]
    assert floor(x, 1000) == wanted or np.sum(np.abs(np.float32(x)) >= floor(x, 1000)) == 1000


@pytest.mark.parametrize(("density", "size", "count"), [(0.3, 10, 3), (1.0, 7, 7), (2, 7, 7)])
def test_a_density_keeps_what_rounding_down_leaves(density, size, count):
    assert magnitude.kept(density, size) == count
    assert magnitude.kept(jnp.float32(density), size) == count

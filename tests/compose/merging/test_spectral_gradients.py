"""Which merges map over weights and have gradients: all, where what they merge has no ties."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.cores import orthonormal
from compose.merging.spectral import SPECTRAL

WEIGHTS = jnp.array([0.7, 1.3, 2.0])
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
methods = pytest.mark.parametrize("name", SPECTRAL)
# The entrywise methods jump where a sign or a rank among magnitudes changes; a sum does not.
SMOOTH = {n: {"inner": "linear"} for n in ("knots", "core_space", "compress_then_merge")}
FIXED = ["compress_then_merge"]  # gradients see its bases as constants: only weights' are whole


@cache
def program(name):
    """A method in its differentiable form, compiled once for two sets of modules and weights."""
    options = SMOOTH.get(name, {})
    return quick(lambda *both: jax.lax.map(lambda one: SPECTRAL[name](*one, **options), both))


def pair(name, first, second):
    """The results of two sets of modules and weights."""
    found = program(name)(*jax.tree.map(lambda *x: jnp.stack(x), first, second))
    return [jax.tree.map(lambda x, n=n: x[n], found) for n in (0, 1)]


@methods
def test_it_maps_over_weights_in_one_program(members, deltas, far, name):
    m = members()
    many = jnp.stack([WEIGHTS, 2 * WEIGHTS[::-1]])
    found = quick(jax.vmap(partial(SPECTRAL[name], **SMOOTH.get(name, {})), (None, 0)))(m, many)
    for n, want in enumerate(pair(name, (m, many[0]), (m, many[1]))):
        assert far(deltas(jax.tree.map(lambda x, n=n: x[n], found)), deltas(want)) < 1e-4


@pytest.mark.parametrize("padded", [False, True])
@methods
def test_its_slope_is_that_of_the_function(members, ragged, deltas, name, padded):
    m, random = ragged if padded else members(), np.random.default_rng(7)
    steps = [random.standard_normal(x.shape) * (x != 0) for x in (m.a, m.b, WEIGHTS)]
    if name in FIXED:
        steps[:2] = [np.zeros_like(x) for x in steps[:2]]
    da, db, dw = (jnp.asarray(x, jnp.float32) for x in steps)
    along = random.standard_normal(11)

    def size(m, weights):
        """A number that every part of the result has to do with."""
        found = SPECTRAL[name](m, weights, **SMOOTH.get(name, {}))
        return found.scale * jnp.sum((along @ found.a) @ found.b)

    def at(*times):
        """The function, a little along the steps and against them."""
        there = [(m.replace(a=m.a + t * da, b=m.b + t * db), WEIGHTS + t * dw) for t in times]
        return [np.sum(along @ deltas(x)) for x in pair(name, *there)]

    slopes = quick(jax.grad(size, (0, 1)))(m, WEIGHTS)
    found = sum(map(jnp.vdot, jax.tree.leaves(slopes), (da, db, dw)))
    want = np.subtract(*at(2e-3, -2e-3)) / 4e-3
    assert abs(found - want) < 1e-2 * max(abs(want), 1)


def test_a_basis_is_differentiable_where_its_singular_values_are_equal():
    x = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((5, 3)))[0], jnp.float32)
    step = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32)
    found = jax.jvp(orthonormal, (x,), (step,))[1]
    want = (orthonormal(x + 1e-2 * step) - orthonormal(x - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(found, want, atol=1e-3)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(orthonormal(x)))(x)))

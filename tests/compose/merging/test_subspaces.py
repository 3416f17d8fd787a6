from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.subspaces import compress_then_merge, core_space, knots
from lora_jax.errors import InputError

WEIGHTS = jnp.array([0.7, 1.3, 2.0])
compiled = partial(jax.jit, static_argnames=["density", "scaled"])


def dense_ties(parts, weights, density):
    """Trim, elect and average; the weights have no vote."""
    count = int(density * parts[0].size)
    floors = [np.sort(np.abs(part).ravel())[-count] for part in parts]
    kept = np.stack([np.where(np.abs(p) >= f, p, 0) for p, f in zip(parts, floors, strict=True)])
    agree = np.sign(kept) == np.where(kept.sum(0) >= 0, 1, -1)
    total = np.einsum("M,M...->...", weights, kept * agree)
    return total / np.maximum(agree.sum(0), 1)


def dense_knots(deltas, weights, density, scaled):
    """As the authors' code has it: matrices (O, I) side by side, in their common directions."""
    u, s, vt = np.linalg.svd(np.hstack([delta.T for delta in deltas]), full_matrices=False)
    there = s > 1e-9 * s[0]
    u, s, vt = u[:, there], s[there], vt[there]
    vs = np.stack(np.split(vt, len(deltas), axis=1))
    if scaled:
        return (u @ dense_ties(s[:, None] * vs, weights, density)).T
    return (u @ np.diag(s) @ dense_ties(vs, weights, density)).T


def dense_core_space(m, deltas, weights, density):
    """As the authors' code has it, from the factors' own singular vectors."""
    a, b = (np.asarray(x, np.float64) for x in (m.a, m.b))
    u = np.linalg.svd(np.hstack(list(a)), full_matrices=False)[0]
    vt = np.linalg.svd(np.vstack(list(b)), full_matrices=False)[2]
    cores = np.stack([u.T @ delta @ vt.T for delta in deltas])
    return u @ dense_ties(cores, weights, density) @ vt


def dense_compressed(deltas, weights, density, rank, beta):
    """Higher-order orthogonal iteration on the dense deltas, then TIES of the cores."""
    norms = np.linalg.norm(deltas, axis=(1, 2), keepdims=True)
    even = deltas / norms * (beta * norms + (1 - beta) * norms.mean())
    u = np.linalg.svd(np.hstack(list(even)))[0][:, :rank]
    for _ in range(500):
        v = np.linalg.svd(np.hstack([(u.T @ delta).T for delta in even]))[0][:, :rank]
        u = np.linalg.svd(np.hstack([delta @ v for delta in even]))[0][:, :rank]
    return u @ dense_ties(u.T @ deltas @ v, weights, density) @ v.T


@pytest.mark.parametrize("scaled", [True, False])
def test_knots_is_the_dense_method(members, deltas, far, scaled):
    m = members()
    want = dense_knots(deltas(m), WEIGHTS, 0.4, scaled)
    found = compiled(knots)(m, WEIGHTS, density=0.4, scaled=scaled)
    assert far(deltas(found), want) < 1e-5
    assert far(want, np.einsum("M,MIO->IO", WEIGHTS, deltas(m))) > 0.1


def test_core_space_is_the_dense_method(members, deltas, far):
    m = members()
    want = dense_core_space(m, deltas(m), WEIGHTS, 0.4)
    assert far(deltas(compiled(core_space)(m, WEIGHTS, density=0.4)), want) < 1e-5


@pytest.mark.parametrize(("rank", "beta"), [(2, 0.0), (3, 0.5)])
def test_compress_then_merge_is_the_dense_method(members, deltas, far, rank, beta):
    m = members()
    m = m.replace(b=m.b * jnp.array([1.0, 3.0, 0.5])[:, None, None])
    want = dense_compressed(deltas(m), WEIGHTS, 0.4, rank, beta)
    found = jax.jit(
        lambda m: compress_then_merge(
            m, WEIGHTS, shared_rank=rank, beta=beta, density=0.4, iterations=500, tolerance=0.0
        )
    )(m)
    assert far(deltas(found), want) < 1e-5
    assert found.a.shape[-1] == rank


def test_compression_stops_when_it_gains_no_more(members, deltas, far):
    m = members()
    run = jax.jit(partial(compress_then_merge, m, WEIGHTS, inner="linear"))
    stopped, long = (deltas(run(tolerance=tolerance)) for tolerance in (1e-6, 0.0))
    assert 0 < far(stopped, long) < 0.05


@pytest.mark.parametrize("method", [knots, core_space])
def test_a_linear_merge_in_a_lossless_basis_is_the_sum(members, deltas, far, method):
    m = members()
    found = deltas(method(m, WEIGHTS, inner="linear"))
    assert far(found, np.einsum("M,MIO->IO", WEIGHTS, deltas(m))) < 1e-5


def test_an_inner_method_that_draws_gets_the_key(members, far, deltas):
    m = members()
    draw = jax.jit(partial(core_space, m, WEIGHTS, inner="dare_linear", density=0.5))
    same, other = (deltas(draw(key=jax.random.key(n))) for n in (1, 2))
    np.testing.assert_array_equal(deltas(draw(key=jax.random.key(1))), same)
    assert far(other, same) > 0.1


def test_a_shared_rank_below_one_is_refused(members):
    with pytest.raises(InputError, match="shared_rank must be at least 1; got 0"):
        compress_then_merge(members(), WEIGHTS, shared_rank=0)

"""The algebra of low-rank deltas scale·a·b, from their factors: no (I, O) matrix is ever formed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.align import common_scale
from compose.decompositions import Triplets, turned, wide
from lora_jax.errors import InputError
from lora_jax.modules import LoRA, fold_scale

Array = jax.Array


def concat(modules: Sequence[LoRA]) -> LoRA:
    """The exact sum of the modules' deltas; their ranks add up."""
    modules = common_scale(modules)
    a = jnp.concatenate([module.a for module in modules], axis=-1)
    b = jnp.concatenate([module.b for module in modules], axis=-2)
    return LoRA(a, b, modules[0].scale)


def inner(x: LoRA, y: LoRA) -> Array:
    """The Frobenius inner product (...) of two deltas: ⟨a b, c d⟩ = Σ (aᵀc) ∘ (b dᵀ)."""
    return x.scale * y.scale * _inner(x.a, x.b, y.a, y.b)


def norm(module: LoRA) -> Array:
    """The Frobenius norm (...) of a delta; exact also where its ranks cancel, as in m - m."""
    return abs(module.scale) * _norm(module.a, module.b)


def svd(module: LoRA) -> Triplets:
    """The thin SVD of a delta: U (..., I, K), S (..., K), Vt (..., K, O), K = min(I, R, O).

    The largest entry of each column of U is positive, so equal deltas have equal vectors wherever
    their singular values are distinct.
    """
    u, s, vt = _svd(module.a, module.b)
    return u, abs(module.scale) * s, vt if module.scale >= 0 else -vt


def recompress(module: LoRA, rank: int) -> tuple[LoRA, Array]:
    """The nearest delta of at most `rank` ranks, and the relative Frobenius error (...) of it.

    Its `a` is orthonormal and its scale 1. A module that is small enough comes back as it is.
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1; got {rank}")
    if module.a.shape[-1] <= rank:
        return module, jnp.zeros(module.a.shape[:-2], jnp.float32)
    u, s, vt = svd(module)
    a, b = u[..., :rank], s[..., :rank, None] * vt[..., :rank, :]
    whole = jnp.linalg.norm(s, axis=-1)
    error = jnp.linalg.norm(s[..., rank:], axis=-1) / jnp.where(whole > 0, whole, 1)
    kept = fold_scale(module)
    return replace(kept, a=a.astype(module.a.dtype), b=b.astype(module.b.dtype)), error


# Each is compiled once a shape; scales stay outside, for they are static and would recompile it.


@jax.jit
def _inner(a: Array, b: Array, c: Array, d: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        left = jnp.einsum("...IR,...IS->...RS", wide(a), wide(c))
        right = jnp.einsum("...RO,...SO->...RS", wide(b), wide(d))
    return jnp.sum(left * right, axis=(-2, -1))


@jax.jit
def _norm(a: Array, b: Array) -> Array:
    return _by_matrix(lambda a, b: jnp.linalg.norm(_core(a, b)[1]), a, b)


@jax.jit
def _svd(a: Array, b: Array) -> Triplets:
    return _by_matrix(_thin_svd, a, b)


@jax.custom_jvp
def _thin_svd(a: Array, b: Array) -> Triplets:
    """The SVD of one a @ b, its signs fixed by the largest entry of each left vector."""
    q, core, p = _core(a, b)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    with jax.default_matmul_precision("highest"):
        u, vt = q @ u, vt @ p.T
    peak = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(u, peak, axis=0) < 0, -1, 1)
    return u * sign, s, vt * sign.T


@_thin_svd.defjvp
def _thin_svd_tangents(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Triplets, Triplets]:
    """Of da·b + a·db, which is not formed."""
    (a, b), (da, db) = jax.tree.map(wide, (primals, tangents))
    found = u, _, vt = _thin_svd(*primals)
    with jax.default_matmul_precision("highest"):
        along = da @ (b @ vt.T) + a @ (db @ vt.T)
        across = (u.T @ da) @ b + (u.T @ a) @ db
        return found, turned(found, along, across, size=max(a.shape[0], b.shape[1]))


def _core(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """a @ b as q @ core @ pᵀ, with orthonormal columns in q and p and a core of R×R at most."""
    q, left = jnp.linalg.qr(wide(a))
    with jax.default_matmul_precision("highest"):
        p, right = jnp.linalg.qr((left @ wide(b)).T)
    return q, right.T, p


def _by_matrix(function: Callable[[Array, Array], Any], a: Array, b: Array) -> Any:
    """`function` of two matrices, over any leading axes of theirs.

    On a CPU that is one after another: two batched decompositions at once can wait for each
    other's threads for ever (jaxlib 0.10.2 on two cores; 0.12 is mended), and are no faster.
    """
    lead = a.shape[:-2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
    result = jax.lax.platform_dependent(
        *flat,
        cpu=lambda a, b: jax.lax.map(lambda pair: function(*pair), (a, b)),
        default=jax.vmap(function),
    )
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), result)

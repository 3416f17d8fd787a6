"""The modules of one projection in common bases, where small cores hold their deltas exactly.

`members` is a LoRA whose leaves have the axis M of the modules in front: a (M, I, R), b (M, R, O).
Two QR decompositions of the factors side by side are all that ever meets I and O.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from lora_jax.modules import LoRA

Array = jax.Array


def bases(members: LoRA) -> tuple[Array, Array, Array]:
    """left (I, K), cores (M, K, L) and right (L, O) with Δᵢ = left·coresᵢ·right, exactly.

    left's columns and right's rows are orthonormal; K and L are at most the ranks' sum.
    """
    left, a, b, right = coordinates(members)
    return left, a @ b, right


def coordinates(members: LoRA) -> tuple[Array, Array, Array, Array]:
    """The same with the cores as factors: left, a (M, K, R), b (M, R, L) with the scale, right."""
    left, a = jnp.linalg.qr(rearrange(wide(members.a), "M I R -> I (M R)"))
    right, b = jnp.linalg.qr(rearrange(wide(members.b), "M R O -> O (M R)"))
    a = rearrange(a, "K (M R) -> M K R", M=len(members.a))
    b = rearrange(b, "L (M R) -> M R L", M=len(members.a))
    return left, a, members.scale * b, right.T


def columns(members: LoRA) -> tuple[Array, Array]:
    """left (I, K) and columns (M, K, O) with Δᵢ = left·columnsᵢ, exactly; left is orthonormal."""
    left, a = jnp.linalg.qr(rearrange(wide(members.a), "M I R -> I (M R)"))
    a = rearrange(a, "K (M R) -> M K R", M=len(members.a))
    return left, members.scale * jnp.einsum("MKR,MRO->MKO", a, wide(members.b))


def product(a: Array, b: Array, members: LoRA) -> LoRA:
    """The module of delta a·b, in the type of the members."""
    return LoRA(a.astype(members.a.dtype), b.astype(members.b.dtype))


@jax.custom_jvp
def orthonormal(x: Array) -> Array:
    """The nearest matrix with orthonormal columns (Procrustes): U·Vᵀ of x = U·S·Vᵀ.

    Directions that x lacks, up to rounding, are left out rather than made up. Differentiable also
    where singular values are equal, which the SVD itself is not.
    """
    u, _, vt = directions(x)
    return u @ vt


def directions(x: Array) -> tuple[Array, Array, Array]:
    """The thin SVD of a matrix; what belongs to no strength is zero."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    there = significant(s, max(x.shape))
    return u * there, s * there, vt * there[:, None]


@orthonormal.defjvp
def _turned(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """How U·Vᵀ turns: by Ω within the two bases, Ωᵢⱼ = (Gᵢⱼ - Gⱼᵢ) / (sᵢ + sⱼ), and out of them."""
    (x,), (dx,) = primals, tangents
    u, s, vt = directions(x)
    within = u.T @ dx @ vt.T
    turn = ratio(within - within.T, s[:, None] + s)
    out = (dx - u @ (u.T @ dx)) @ vt.T * ratio(jnp.ones_like(s), s)
    down = ratio(jnp.ones_like(s), s)[:, None] * (u.T @ (dx - dx @ vt.T @ vt))
    return u @ vt, u @ turn @ vt + out @ vt + u @ down


def significant(s: Array, size: int) -> Array:
    """Which singular values (..., K) of a matrix of `size` rows or columns are not rounding."""
    return s > 10 * size * jnp.finfo(s.dtype).eps * jnp.max(s, axis=-1, keepdims=True)


def ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0; its gradient is finite there too."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def wide(x: Array) -> Array:
    """In float32 at least: no decomposition exists for less."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

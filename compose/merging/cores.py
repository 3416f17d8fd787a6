"""The modules of one projection in common bases, where small cores hold their deltas exactly.

`members` is a LoRA whose leaves have the axis M of the modules in front: a (M, I, R), b (M, R, O).
Two QR decompositions of the factors side by side are all that ever meets I and O.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from compose.decompositions import ratio, significant, svd, wide
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
    left, a = _basis(members, members.a)
    right, b = _basis(members, members.b.mT)
    return left, a, members.scale * b.mT, right.T


def columns(members: LoRA) -> tuple[Array, Array]:
    """left (I, K) and columns (M, K, O) with Δᵢ = left·columnsᵢ, exactly; left is orthonormal."""
    left, a = _basis(members, members.a)
    return left, members.scale * jnp.einsum("MKR,MRO->MKO", a, wide(members.b))


def _basis(members: LoRA, factors: Array) -> tuple[Array, Array]:
    """Orthonormal columns (I, K) that hold those of factors (M, I, R), and these in them (M, K, R).

    Where a module of lower rank is padded something else takes the place of its zeros, as a QR
    decomposition of zeros has no derivative; then they are zeros again.
    """
    real = (jnp.any(members.a != 0, axis=1) | jnp.any(members.b != 0, axis=2))[:, None]
    filling = jax.random.normal(jax.random.key(0), factors.shape, wide(factors).dtype)
    filled = jnp.where(real, wide(factors), filling)
    basis, inside = jnp.linalg.qr(rearrange(filled, "M I R -> I (M R)"))
    return basis, real * rearrange(inside, "K (M R) -> M K R", M=len(factors))


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
    u, s, vt = svd(x)
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

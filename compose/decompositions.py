"""The singular value decomposition with derivatives also where singular values are 0.

JAX's own are NaN as soon as two singular values are equal, as the zeros are that padding makes.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Triplets = tuple[Array, Array, Array]


@jax.custom_jvp
def svd(x: Array) -> Triplets:
    """The thin SVD of a matrix: U (I, K), S (K,), Vᵀ (K, O).

    Vectors of singular values that are 0 are arbitrary, and so are their derivatives, which are
    finite. Of equal singular values the derivatives leave out how their vectors turn into each
    other.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


@svd.defjvp
def _svd_tangents(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Triplets, Triplets]:
    (x,), (dx,) = primals, tangents
    found = u, _, vt = svd(x)
    return found, turned(found, dx @ vt.T, u.T @ dx, size=max(x.shape))


def turned(triplets: Triplets, along: Array, across: Array, *, size: int) -> Triplets:
    """How an SVD of X moves with X: the tangents of U, S and Vᵀ from dX·V and Uᵀ·dX.

    Within the bases as Fᵢⱼ = 1 / (sⱼ² - sᵢ²) says, and out of them; singular values that are only
    rounding, for a matrix of `size` rows or columns, count as 0.
    """
    u, s, vt = triplets
    s = s * significant(s, size)
    within = u.T @ along
    # Not s² - s²: where one product is rounded and the other is not, that is no 0 of equal values.
    turn = ratio(jnp.ones_like(within), (s - s[:, None]) * (s + s[:, None]))
    turn_u = turn * (within * s + s[:, None] * within.T)
    turn_v = turn * (s[:, None] * within + within.T * s)
    inverse = ratio(jnp.ones_like(s), s)
    du = u @ turn_u + (along - u @ within) * inverse
    dv = vt.T @ turn_v + (across.T - vt.T @ within.T) * inverse
    return du, jnp.diagonal(within), dv.T


def significant(s: Array, size: int) -> Array:
    """Which singular values (..., K) of a matrix of `size` rows or columns are not rounding."""
    return s > 10 * size * jnp.finfo(s.dtype).eps * jnp.max(s, axis=-1, keepdims=True)


def ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0; its gradient is finite there too."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def wide(x: Array) -> Array:
    """In float32 at least: no decomposition exists for less."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

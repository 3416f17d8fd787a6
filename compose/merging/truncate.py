"""The nearest matrix of a low rank to a dense one, without the SVD of a big one.

Knyazev, "Toward the Optimal Preconditioned Eigensolver" (SIAM J. Sci. Comput. 23, 2001), from a
random start as in Halko, Martinsson and Tropp, "Finding Structure with Randomness" (0909.4061).
"""

import jax
import jax.numpy as jnp

from compose.decompositions import svd

Array = jax.Array
SMALL = 256  # up to this a matrix has its SVD whole
SPARE = 8  # directions beyond the rank, so that the last ones wanted converge as well
ROUNDS = 30  # more are not made
GAIN = 1e-3  # a round that captures less than this share of what is lost is the last
NOISE = 1e-6  # a share of the squared norm that float32 cannot tell from nothing


def truncated(x: Array, rank: int) -> tuple[Array, Array, Array]:
    """a (I, R), b (R, O) with a·b nearest to x (I, O), and the relative Frobenius error () of it.

    `a` is orthonormal; R is `rank`, or min(I, O) if that is less. Small matrices have their exact
    SVD. For big ones the error is within 0.1 % of the least, and gradients see the directions that
    are kept as constants.
    """
    rank = min(rank, *x.shape)
    short = min(x.shape)
    with jax.default_matmul_precision("highest"):
        if short <= max(SMALL, 3 * (rank + SPARE)):
            u, s, vt = svd(x)
            a, b = u[:, :rank], s[:rank, None] * vt[:rank]
        elif short == x.shape[0]:
            a, b = _leading(x, rank)
        else:
            right, left = _leading(x.T, rank)
            a, core = jnp.linalg.qr(left.T)
            b = core @ right.T
        whole = jnp.linalg.norm(x)
        return a, b, jnp.linalg.norm(x - a @ b) / jnp.where(whole > 0, whole, 1)


def _leading(x: Array, rank: int) -> tuple[Array, Array]:
    """u (I, R), orthonormal, and uᵀx (R, O), where uᵀx has nearly the largest norm possible.

    A round looks for the best directions among the present ones, their images under x·xᵀ and the
    last round's change: a conjugate gradient of many directions, each product with x for all.
    """
    whole_x, x = x, jax.lax.stop_gradient(x)
    width = rank + SPARE
    whole = jnp.sum(x**2)
    start = jax.random.normal(jax.random.key(0), (x.shape[1], width), x.dtype)
    basis, _ = jnp.linalg.qr(x @ start)
    basis = jnp.pad(basis, [(0, 0), (0, 2 * width)])
    image = basis.T @ x
    state = (0, basis, image, _directions(image), jnp.zeros_like(whole), -whole)

    def going(state: tuple) -> Array:
        """Whether the last round still captured more."""
        n, *_, now, before = state
        enough = jnp.maximum(GAIN * (whole - now), NOISE * whole)
        return (n < 2) | ((n < ROUNDS) & (now - before > enough))

    def round_(state: tuple) -> tuple:
        """The next basis (I, 3K), its image (3K, O), its directions and what they capture."""
        n, basis, image, directions, now, _ = state
        turn = _turn(directions, width)
        kept, image = basis @ turn, turn.T @ image
        new = _new(x @ image[:width].T, kept)
        basis = jnp.concatenate([kept, new], axis=1)
        image = jnp.concatenate([image, new.T @ x])
        directions = _directions(image)
        captured = jnp.sum((directions[:, :rank].T @ image) ** 2)
        return n + 1, basis, image, directions, captured, now

    _, _, image, directions, *_ = jax.lax.while_loop(going, round_, state)
    u, _ = jnp.linalg.qr(x @ (directions[:, :rank].T @ image).T)
    return u, u.T @ whole_x


def _directions(image: Array) -> Array:
    """Coordinates (3K, 3K) of a basis' directions, by what they capture, the most first."""
    return jnp.linalg.eigh(image @ image.T)[1][:, ::-1]


def _turn(directions: Array, width: int) -> Array:
    """Coordinates (3K, 2K), orthonormal, of the best directions and then of their change."""
    best = directions[:, :width]
    change = best.at[:width].set(0)
    return jnp.linalg.qr(jnp.concatenate([best, change], axis=1))[0]


def _new(images: Array, kept: Array) -> Array:
    """What images (I, K) have beyond the kept directions (I, 2K), made orthonormal.

    The second time is for images with nothing new, whose rounding the first makes large.
    """
    for _ in range(2):
        images, _ = jnp.linalg.qr(images - kept @ (kept.T @ images))
    return images

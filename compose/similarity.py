"""How alike the modules of a library are: cosines of what they add, and overlaps of subspaces.

A delta's input subspace is spanned by its left singular vectors (..., I), its output subspace by
its right ones. Everything comes from QR and the SVD of cores of R×R: no (I, O) matrix is formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from compose.library import Library, stack
from compose.lowrank import svd
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import IA3, Adapter, LoRA, Saved

Array = jax.Array
Measure = Literal["cosine", "input", "output"]
MEASURES = ("cosine", "input", "output")


@dataclass(frozen=True)
class Similarity:
    """How alike modules are, pair by pair: overall, at each projection, and at each of its layers.

    Cosines lie in -1 to 1, overlaps in 0 to 1. Where a module adds nothing it is like no other,
    itself included: 0.
    """

    measure: Measure
    names: tuple[str, ...]
    overall: np.ndarray  # (M, M)
    projections: dict[str, np.ndarray]  # (M, M)
    layers: dict[str, np.ndarray]  # (N, M, M)


def similarity(library: Library, measure: Measure = "cosine") -> Similarity:
    """The library's modules against each other, all pairs in one compiled program.

    "cosine" is of what modules add; over layers and projections, of all of it as one vector.
    "input" and "output" are ‖UᵢᵀUⱼ‖² / min(rᵢ, rⱼ), the mean squared cosine of the principal angles
    between deltas' subspaces (Hu et al., "LoRA", 2106.09685, equation 4, of all directions); over
    layers and projections, the mean over the places that both change. Weights kept whole are left
    out.
    """
    terms = _terms(library.adapters, [], measure)
    parts = {path: jnp.sum(term, axis=1) for path, term in terms.items()}
    return Similarity(
        measure,
        library.names,
        _quotient(_total(list(parts.values()), 2 * (len(library.names),))),
        {path: _quotient(part) for path, part in parts.items()},
        {path: _quotient(term) for path, term in terms.items()},
    )


def nearest(
    library: Library, adapter: Adapter, count: int = 5, *, measure: Measure = "cosine"
) -> list[tuple[str, float]]:
    """The `count` modules of a library most like an adapter overall, by name, the likest first."""
    if count < 1:
        raise InputError(f"count must be at least 1; got {count}")
    terms = _terms(library.adapters, [adapter], measure).values()
    parts = [jnp.sum(term, axis=1) for term in terms]
    values = _quotient(_total(parts, (len(library.names), 1)))[:, 0]
    order = np.argsort(-values, kind="stable")[:count]
    return [(library.names[n], float(values[n])) for n in order]


def principal_angles(
    x: Adapter, y: Adapter, side: Literal["input", "output"]
) -> dict[str, list[np.ndarray]]:
    """The angles between two modules' subspaces, in radians from the smallest, by layer.

    Of every projection that both change. A layer has as many as the smaller rank of the two there;
    small angles are exact too (Björck and Golub, "Numerical Methods for Computing Angles Between
    Linear Subspaces").
    """
    from scipy.linalg import subspace_angles  # its import takes a quarter of a second

    _refuse([x, y], side)

    def spans(module: Any) -> list[np.ndarray]:
        """The subspace of each layer, (size, its rank)."""
        basis = np.asarray(_basis(module, side), np.float64)
        layers = basis.reshape(-1, *basis.shape[-2:])
        return [layer[:, layer.any(axis=0)] for layer in layers]

    def angles(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Ascending; none where one of the two adds nothing."""
        some = one.shape[1] and other.shape[1]
        return np.sort(subspace_angles(one, other)) if some else np.zeros(0)

    shared = [path for path in x if path in y and isinstance(x[path], LoRA)]
    return {path: list(map(angles, spans(x[path]), spans(y[path]))) for path in shared}


def _terms(
    adapters: Sequence[Adapter], others: Sequence[Adapter], measure: Measure
) -> dict[str, Array]:
    """What adapters and others share, and what each has, at each projection: (3, N, M, L).

    Without others the adapters are compared among themselves. Terms add up over places; what is
    measured is `_quotient` of them.
    """
    _refuse([*adapters, *others], measure)
    every = [
        {path: m for path, m in adapter.items() if not isinstance(m, Saved)}
        for adapter in (*adapters, *others)
    ]
    stacked = stack(every)
    found = _compared(stacked, len(adapters), measure)
    return {path: found[path] for path in stacked}  # in the table's order, not the alphabet's


@partial(jax.jit, static_argnames=("count", "measure"))
def _compared(stacked: Adapter, count: int, measure: Measure) -> dict[str, Array]:
    """The terms of the first `count` of stacked adapters with the rest, or among themselves."""

    def one(module: Any) -> Array:
        """The terms (3, N, M, L) of one projection, a layer at a time."""
        pairs, leaves = _compare(module, measure)

        def layer(leaves: tuple[Array, ...]) -> Array:
            rows = [x[:count] for x in leaves]
            columns = [x[count:] for x in leaves] if len(leaves[0]) > count else rows
            with jax.default_matmul_precision("highest"):
                return jnp.stack(jnp.broadcast_arrays(*pairs(rows, columns)))

        return jnp.moveaxis(jax.lax.map(layer, tuple(jnp.moveaxis(x, 1, 0) for x in leaves)), 1, 0)

    return {path: one(module) for path, module in stacked.items()}


def _compare(module: Any, measure: Measure) -> tuple[Callable[..., Any], tuple[Array, ...]]:
    """How to compare stacked modules of one projection, and what of them (M, N, ...) to compare."""
    if isinstance(module, IA3):
        return _offsets, (module.offset,)
    if measure == "cosine":
        u, s, vt = svd(module)
        return _deltas, (u, s[..., None] * vt)
    return _spans, (_basis(module, measure),)


def _offsets(x: list[Array], y: list[Array]) -> tuple[Array, ...]:
    """Inner products of offsets (M, F) and (L, F), and their squared lengths."""
    return x[0] @ y[0].T, jnp.sum(x[0] ** 2, 1)[:, None], jnp.sum(y[0] ** 2, 1)


def _deltas(x: list[Array], y: list[Array]) -> tuple[Array, ...]:
    """Inner products of deltas u·w, u orthonormal, and their squared lengths."""
    left = jnp.einsum("MIR,LIS->MLRS", x[0], y[0])
    right = jnp.einsum("MRO,LSO->MLRS", x[1], y[1])
    one, other = (jnp.sum(w**2, axis=(1, 2)) for w in (x[1], y[1]))
    return jnp.sum(left * right, axis=(2, 3)), one[:, None], other


def _spans(x: list[Array], y: list[Array]) -> tuple[Array, ...]:
    """Overlaps of subspaces of orthonormal columns, and 1 where both have some, twice."""
    squares = jnp.sum(jnp.einsum("MIR,LIS->MLRS", x[0], y[0]) ** 2, axis=(2, 3))
    ranks = [jnp.sum(jnp.any(u != 0, axis=1), axis=1) for u in (x[0], y[0])]
    least = jnp.minimum(ranks[0][:, None], ranks[1])
    some = jnp.sign(least).astype(squares.dtype)
    return squares / jnp.maximum(least, 1), some, some


def _basis(module: Any, side: Measure) -> Array:
    """Orthonormal columns (..., size, K) that span a delta's subspace; zeros beyond its rank."""
    u, s, vt = svd(module)
    columns = u if side == "input" else jnp.swapaxes(vt, -1, -2)
    least = jnp.finfo(s.dtype).eps * max(u.shape[-2], vt.shape[-1])  # as NumPy's matrix_rank
    real = s > least * jnp.max(s, axis=-1, keepdims=True)
    return jnp.where(real[..., None, :], columns, 0)


def _total(parts: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """The sum of projections' terms (3, M, L)."""
    return sum(parts, jnp.zeros((3, *shape)))


def _quotient(terms: Array) -> np.ndarray:
    """What modules share over the root of what each has; 0 where one has nothing."""
    shared, one, other = terms
    size = jnp.sqrt(one) * jnp.sqrt(other)
    return np.asarray(jnp.clip(shared / jnp.where(size > 0, size, 1), -1, 1))


def _refuse(adapters: Sequence[Adapter], measure: Measure) -> None:
    """Refuses an unknown measure, and modules that it is not defined for."""
    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}; choose {', '.join(MEASURES)}")
    allowed = LoRA | IA3 | Saved if measure == "cosine" else LoRA | Saved
    held = {p: m for adapter in adapters for p, m in adapter.items() if not isinstance(m, allowed)}
    told = [f"{path} holds {type(module).__name__}" for path, module in held.items()]
    refuse_all(told, f"modules have no {measure} to compare")

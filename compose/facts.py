"""What is measured of modules before they are composed: `compose.explain` reads methods off it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compose.align import by_projection, common_rank
from compose.arithmetic import refuse_sum, subtract, weighted_sum
from compose.diagnose import alignment
from compose.geometry import norm
from compose.library import Library, stack
from compose.similarity import similarity
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, LoRA, Saved

_ROWS = 16  # of a delta's inputs, evenly spaced, at which signs are compared


@dataclass(frozen=True)
class Facts:
    """What is known of some modules, pair by pair as (M, M) in the order of `names`.

    Where modules do not fit together, `misfit` says why and nothing is measured.
    """

    names: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]  # of each module, as all below
    ranks: tuple[tuple[int, ...], ...]
    scales: tuple[tuple[float, ...], ...]
    targets: tuple[tuple[str, ...], ...]
    seeds: tuple[int | None, ...]  # of their initialisation, where a record tells
    width: int  # the smallest input or output size of a LoRA; 0 without
    misfit: str = ""
    norms: tuple[float, ...] = ()
    cosines: np.ndarray | None = None  # of what modules add
    factors: np.ndarray | None = None  # cosines of their a's, where LoRAs meet
    inputs: np.ndarray | None = None  # overlaps of the subspaces that deltas read, 0 to 1
    outputs: np.ndarray | None = None  # and that they write to
    sum_gap: float = 0.0  # how far the sum in factor space is off, over the exact one's norm
    mean_gap: float = 0.0  # and the average
    prototypes: float = 0.0  # mean size of the cosine between two modules' Arrow prototypes
    conflict: float = 0.0  # share of entries at which two modules have opposite signs


def measured(
    adapters: Mapping[str, Adapter], seeds: Mapping[str, int | None] | None = None
) -> Facts:
    """The facts of named modules; `seeds` are of their initialisation, where that is known."""
    if not adapters:
        raise InputError("no module to explain; give at least one")
    plain = _described(adapters, seeds or {})
    if misfit := _misfit(adapters):
        return replace(plain, misfit=misfit)
    given = list(adapters.values())
    library = Library(tuple(adapters), tuple(given))
    loras = any(isinstance(m, LoRA) for adapter in given for m in adapter.values())
    only = library.map(lambda x: {p: m for p, m in x.items() if isinstance(m, LoRA)})
    return replace(
        plain,
        norms=tuple(float(norm(adapter)) for adapter in given),
        cosines=similarity(library).overall,
        factors=_factor_cosines(only.adapters) if loras else None,
        inputs=similarity(only, "input").overall if loras else None,
        outputs=similarity(only, "output").overall if loras else None,
        sum_gap=_gap(only.adapters, 1.0) if loras else 0.0,
        mean_gap=_gap(only.adapters, 1 / len(given)) if loras else 0.0,
        prototypes=alignment(only) if loras else 0.0,
        conflict=_conflict(given),
    )


def _described(adapters: Mapping[str, Adapter], seeds: Mapping[str, int | None]) -> Facts:
    """What the modules are, without a measurement."""
    given = list(adapters.values())
    loras = [[m for m in adapter.values() if isinstance(m, LoRA)] for adapter in given]
    sizes = [size for modules in loras for m in modules for size in (m.a.shape[-2], m.b.shape[-1])]
    return Facts(
        tuple(adapters),
        tuple(tuple(sorted({type(m).__name__ for m in adapter.values()})) for adapter in given),
        tuple(tuple(sorted({m.a.shape[-1] for m in modules})) for modules in loras),
        tuple(tuple(sorted({float(m.scale) for m in modules})) for modules in loras),
        tuple(tuple(adapter) for adapter in given),
        tuple(seeds.get(name) for name in adapters),
        min(sizes, default=0),
    )


def _misfit(adapters: Mapping[str, Adapter]) -> str:
    """Why the modules cannot be added up, or ""."""
    try:
        for name, adapter in adapters.items():
            for path, module in adapter.items():
                refuse_sum(f"{name}: {path}", module)
                if not isinstance(module, LoRA | IA3 | Saved):
                    kind = type(module).__name__
                    raise InputError(f"{name}: {path} holds {kind}; explain a library's modules")
        by_projection(list(adapters.values()))
    except InputError as error:
        return str(error)
    return ""


def _factor_cosines(adapters: Sequence[Adapter]) -> np.ndarray:
    """Cosines (M, M) between the a's of every two modules, over the projections that both change.

    The smaller rank counts as padded with zeros.
    """
    products = np.zeros((3, len(adapters), len(adapters)))
    for modules in by_projection(adapters).values():
        found = {n: m for n, m in enumerate(modules) if isinstance(m, LoRA)}
        padded = [np.asarray(m.a, np.float64).ravel() for m in common_rank(list(found.values()))]
        rows = np.stack(padded)
        squares = np.sum(rows**2, axis=1)
        both = np.ix_([0, 1, 2], list(found), list(found))
        products[both] += np.stack(
            np.broadcast_arrays(rows @ rows.T, squares[:, None], squares[None, :])
        )
    size = np.sqrt(products[1] * products[2])
    return products[0] / np.where(size > 0, size, 1)


def _gap(adapters: Sequence[Adapter], weight: float) -> float:
    """How far a sum with equal weights in factor space is off, over the exact sum's norm."""
    weights = [weight] * len(adapters)
    factor, delta = (weighted_sum(adapters, weights, space=s) for s in ("factor", "delta"))
    size = float(norm(delta))
    return float(norm(subtract(factor, delta, space="delta"))) / size if size else 0.0


def _conflict(adapters: Sequence[Adapter]) -> float:
    """The share of entries, of those that two modules both change, where their signs differ.

    Of evenly spaced rows of deltas, at every projection and layer, and of all offsets; over pairs.
    """
    agreed = both = 0.0
    pairs = np.triu_indices(len(adapters), 1)
    for entries in _entries(adapters):
        signs = np.sign(entries).reshape(len(adapters), -1)
        agreed += float((signs @ signs.T)[pairs].sum())  # those of one sign less the others
        both += float((np.abs(signs) @ np.abs(signs).T)[pairs].sum())
    return (both - agreed) / 2 / both if both else 0.0


def _entries(adapters: Sequence[Adapter]) -> Iterator[np.ndarray]:
    """What the modules add (M, ...), at some entries of each layer of each projection in turn."""
    plain = [{p: m for p, m in x.items() if not isinstance(m, Saved)} for x in adapters]
    for module in stack(plain).values():
        if isinstance(module, IA3):
            yield np.asarray(module.offset)
        elif isinstance(module, LoRA):
            a, b = np.asarray(module.a), np.asarray(module.b)
            rows = np.linspace(0, a.shape[-2] - 1, min(_ROWS, a.shape[-2]), dtype=int)
            for layer in range(a.shape[1]):
                yield module.scale * (a[:, layer, rows] @ b[:, layer])

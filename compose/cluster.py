"""Model-based clustering: the modules of a library in groups that may share one expert.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (2405.11157),
section 3: cluster the private modules, then train one on the data of each group
(`compose.retraining`).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import numpy as np

from compose.arithmetic import Space, average
from compose.library import Library, stack
from compose.merging.merge import merge
from compose.similarity import similarity
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, LoRA, Saved

Method = Literal["mttl", "delta"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Clusters:
    """A library's modules in groups, and the similarities that they were grouped by."""

    method: Method
    names: tuple[str, ...]  # of the library's modules
    groups: tuple[tuple[str, ...], ...]  # in the library's order, groups by their first module
    similarity: np.ndarray  # (M, M), cosines
    inertia: float  # the sum of squared distances of its rows to their group's mean

    def labels(self) -> tuple[str, ...]:
        """The groups' names, in order: cluster_1, cluster_2, ..."""
        return tuple(f"cluster_{n}" for n in range(1, len(self.groups) + 1))


def cluster_library(
    library: Library,
    k: int = 10,
    method: Method = "mttl",
    *,
    sparsity: float = 0.5,
    components: int = 64,
    seed: int = 42,
    restarts: int = 10,
) -> Clusters:
    """The library's modules in k groups, by k-means on the rows of their matrix of cosines.

    "delta" takes the cosines of what modules add, exactly (`compose.similarity`). "mttl" is MTTL's
    recipe: the cosines of all a's and b's of each LoRA, side by side, with the `sparsity` share of
    smallest entries at zero and brought down to `components` dimensions by a truncated SVD. Ranks
    are padded with zeros, and a projection that a module leaves alone counts as zeros; a threshold
    is of a module's own entries. MTTL's SVD is scikit-learn's randomized one, here it is exact; its
    k-means++ draws several candidates for each centre, SciPy's one.
    """
    _refuse(library, k, method, sparsity, components, restarts)
    if method == "mttl":
        found = _cosines(_gram(library.adapters, sparsity), components)
    else:
        found = similarity(library).overall.astype(np.float64)
    if len(np.unique(found.round(6), axis=0)) < k:
        raise InputError(f"k is {k}, but fewer modules than that differ; choose a smaller k")
    labels, inertia = _k_means(found, k, seed, restarts)
    groups: dict[int, list[str]] = {}
    for name, label in zip(library.names, labels, strict=True):
        groups.setdefault(int(label), []).append(name)
    return Clusters(method, library.names, tuple(map(tuple, groups.values())), found, inertia)


def cluster_means(
    library: Library,
    clusters: Clusters,
    *,
    method: str | None = None,
    space: Space = "delta",
    **options: Any,
) -> Library:
    """One module for every cluster: the average of its modules, or their merge by a method.

    The options are those of `compose.merging.merge.merge`. Ranks of an average in delta space add
    up; `compose.geometry.recompress_members` brings them down.
    """
    by_name = dict(zip(library.names, library.adapters, strict=True))

    def one(group: tuple[str, ...]) -> Adapter:
        """The module of one group."""
        members = [by_name[name] for name in group]
        if method is None:
            return average(members, space=space)
        return merge(members, method, space=space, **options)[0]

    adapters = tuple(map(one, clusters.groups))
    return replace(library, names=clusters.labels(), adapters=adapters, routing=None, vectors={})


def _refuse(
    library: Library, k: int, method: str, sparsity: float, components: int, restarts: int
) -> None:
    """Refuses numbers that make no sense, and modules that MTTL's recipe has no factors of."""
    count = len(library.names)
    problems = [f"k must lie between 1 and the {count} modules; got {k}"] * (not 1 <= k <= count)
    if method not in METHODS:
        problems.append(f"unknown method {method!r}; choose {' or '.join(METHODS)}")
    if not 0 <= sparsity < 1:
        problems.append(f"sparsity must lie in [0, 1); got {sparsity:g}")
    numbers = {"components": components, "restarts": restarts}
    problems += [
        f"{n} must be at least 1; got {value}" for n, value in numbers.items() if value < 1
    ]
    if method == "mttl":
        held = {p: m for adapter in library.adapters for p, m in adapter.items()}
        problems += [
            f"{path} holds {type(m).__name__}, which mttl does not flatten; take delta"
            for path, m in held.items()
            if not isinstance(m, LoRA | Saved)
        ]
    refuse_all(problems, "clustering")


def _gram(adapters: tuple[Adapter, ...], sparsity: float) -> np.ndarray:
    """Inner products (M, M) of the modules' sparse factors, one projection's after another."""
    loras = [{p: m for p, m in x.items() if isinstance(m, LoRA)} for x in adapters]
    floors = np.array([_floor(adapter, sparsity) for adapter in loras])[:, None]
    total = np.zeros((len(adapters), len(adapters)))
    for leaves in _padded(loras):
        rows = np.asarray(leaves, np.float64).reshape(len(adapters), -1)
        rows = np.where(np.abs(rows) > floors, rows, 0)
        total += rows @ rows.T
    return total


def _floor(adapter: Adapter, sparsity: float) -> float:
    """The magnitude that a `sparsity` of a module's entries do not exceed."""
    leaves = [np.abs(np.asarray(x, np.float64)).ravel() for x in jax.tree.leaves(dict(adapter))]
    return float(np.quantile(np.concatenate(leaves), sparsity)) if leaves and sparsity else 0.0


def _padded(adapters: list[dict[str, LoRA]]) -> Iterator[jax.Array]:
    """The a's and b's (M, N, ...) of all modules at each projection; no scale is folded in."""
    plain = [{p: replace(m, scale=1.0) for p, m in adapter.items()} for adapter in adapters]
    for path in dict.fromkeys(path for adapter in plain for path in adapter):
        only = [{path: x[path]} if path in x else {} for x in plain]
        yield from jax.tree.leaves(stack(only))


def _cosines(gram: np.ndarray, components: int) -> np.ndarray:
    """Cosines (M, M) of vectors with these inner products, in their `components` main directions.

    The truncated SVD of the vectors themselves, whose left side these products hold.
    """
    energies, directions = np.linalg.eigh(gram)
    kept = np.sqrt(np.maximum(energies[-components:], 0)) * directions[:, -components:]
    sizes = np.linalg.norm(kept, axis=1, keepdims=True)
    units = kept / np.where(sizes > 0, sizes, 1)
    return units @ units.T


def _k_means(rows: np.ndarray, k: int, seed: int, restarts: int) -> tuple[np.ndarray, float]:
    """The labels (M,) of the best of several runs from k-means++, and their inertia."""
    random = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # its centre stays
        runs = [_run(rows, k, random) for _ in range(restarts)]
    return min(runs, key=lambda run: run[1])


def _run(rows: np.ndarray, k: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Labels that no longer change, and the sum of squared distances to their means."""
    from scipy.cluster.vq import kmeans2  # its import takes a quarter of a second

    centres, labels = kmeans2(rows, k, iter=1, minit="++", rng=random)
    for _ in range(300):
        before = labels
        centres, labels = kmeans2(rows, centres, iter=1, minit="matrix")
        if np.array_equal(before, labels):
            break
    return labels, float(np.sum((rows - centres[labels]) ** 2))

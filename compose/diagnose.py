"""What a composition did to its modules, in numbers: how large, how alike, and what it is made of.

Everything is measured on deltas, from their factors. What no input alone accounts for, and what is
still the first draw of a factor, are the two artefacts of factor-space arithmetic: see
`compose.controls` for the experiments that rule them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from compose.arithmetic import Space, subtract, weighted_sum
from compose.expression import resolve
from compose.geometry import cosine, norm
from compose.library import Library
from compose.lowrank import svd
from compose.routing.directions import prototypes
from compose.summary import members
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA

Inputs = Mapping[str, Adapter | Library]


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a composition; inputs and results are named as in its tables."""

    expression: str
    space: Space
    norms: dict[str, float]  # of what each input adds, then of what each result adds
    results: tuple[str, ...]  # which of those names are results
    cosines: np.ndarray  # (K, K) between what they add, in the order of `norms`
    effective_ranks: dict[str, float]  # mean over projections and layers
    interaction: dict[str, float]  # by result: the share that no input alone accounts for
    gap: dict[str, float]  # by result: how far the other space's is, over delta space's norm
    initial: dict[str, float] = field(default_factory=dict)  # share of a's that is their first draw
    prototypes: dict[str, float] = field(default_factory=dict)  # of libraries: see `alignment`


def diagnose(
    text: str,
    inputs: Inputs,
    *,
    space: Space = "delta",
    initial: Mapping[str, Adapter] | None = None,
) -> Diagnosis:
    """The diagnosis of an expression over its inputs.

    `initial` maps an input's name to its state before training (`compose.controls.untrained`).
    """
    value = resolve(text, inputs, space=space)
    before = [row for name, given in inputs.items() for row in members(name, given)]
    after = members("result", value)
    every = before + after
    lengths = {name: float(norm(adapter)) for name, adapter in every}
    if len(lengths) < len(every):
        raise InputError("an input is called result; give it another name")
    sides = {name: value for name, value in inputs.items() if isinstance(value, Library)}
    return Diagnosis(
        text,
        space,
        lengths,
        tuple(name for name, _ in after),
        np.asarray([[float(cosine(x, y)) for _, y in every] for _, x in every]),
        {name: effective_rank(adapter) for name, adapter in every},
        _interaction(text, inputs, space, after),
        _gap(text, inputs, after, space),
        _initial_shares(before, after, initial or {}),
        {n: alignment(v) for n, v in sides.items()}
        | ({"result": alignment(value)} if isinstance(value, Library) else {}),
    )


def effective_rank(adapter: Adapter) -> float:
    """The mean over projections and layers of e^H, H the entropy of squared singular values.

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007), on energies; 0 where nothing is added.
    """
    ranks = []
    for module in adapter.values():
        if isinstance(module, LoRA):
            energy = jnp.square(svd(module)[1])
            total = jnp.sum(energy, axis=-1, keepdims=True)
            share = energy / jnp.where(total > 0, total, 1)
            entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
            ranks.append(np.ravel(jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)))
    return float(np.concatenate(ranks).mean()) if ranks else 0.0


def _interaction(
    text: str, inputs: Inputs, space: Space, after: list[tuple[str, Adapter]]
) -> dict[str, float]:
    """The norm of each result less what every input gives with the others silent, over its norm.

    In factor space these are the cross terms; sums of deltas have none.
    """
    silent = {name: jax.tree.map(jnp.zeros_like, value) for name, value in inputs.items()}
    alone = [
        members("result", resolve(text, silent | {name: value}, space=space))
        for name, value in inputs.items()
    ]
    found = {}
    for n, (name, adapter) in enumerate(after):
        parts = [rows[n][1] for rows in alone]
        rest = weighted_sum([adapter, *parts], [1.0] + [-1.0] * len(parts), space="delta")
        found[name] = _over(norm(rest), norm(adapter))
    return found


def _gap(
    text: str, inputs: Inputs, after: list[tuple[str, Adapter]], space: Space
) -> dict[str, float]:
    """How far each result is from the one of the other space, over the norm of delta space's.

    Nothing if the other space refuses the expression.
    """
    other: Space = "factor" if space == "delta" else "delta"
    try:
        rows = members("result", resolve(text, inputs, space=other))
    except InputError:
        return {}
    exact = rows if other == "delta" else after
    triples = zip(after, rows, exact, strict=True)
    return {
        name: _over(norm(subtract(x, y, space="delta")), norm(whole))
        for (name, x), (_, y), (_, whole) in triples
    }


def _initial_shares(
    before: list[tuple[str, Adapter]],
    after: list[tuple[str, Adapter]],
    initial: Mapping[str, Adapter],
) -> dict[str, float]:
    """The share of first draws in inputs that have one, and of the first of those in results."""
    shares = {name: initial_share(a, initial[name]) for name, a in before if name in initial}
    if not initial:
        return {}
    first = next(iter(initial.values()))
    return shares | {name: initial_share(adapter, first) for name, adapter in after}


def initial_share(adapter: Adapter, initial: Adapter) -> float:
    """The share of its a's squared norm that lies along their initial draws, over all projections.

    1 where a is as it was drawn, up to its size; near 0 where nothing of the draw is left.
    """
    along, whole = 0.0, 0.0
    for path, module in adapter.items():
        first = initial.get(path)
        if not isinstance(module, LoRA) or not isinstance(first, LoRA):
            continue
        a, drawn = (np.asarray(m.a, np.float64) for m in (module, first))
        drawn = np.pad(
            drawn, [(0, 0)] * (a.ndim - 1) + [(0, max(a.shape[-1] - drawn.shape[-1], 0))]
        )
        drawn = drawn[..., : a.shape[-1]]
        product = np.sum(a * drawn, axis=(-2, -1))
        size = np.sum(drawn**2, axis=(-2, -1))
        along += float(np.sum(product**2 / np.where(size > 0, size, 1)))
        whole += float(np.sum(a**2))
    return along / whole if whole else 0.0


def alignment(library: Library) -> float:
    """The mean size of the cosine between two modules' prototypes, over projections and layers.

    The less it is, the better Arrow can tell the modules apart. 0 for a library of one.
    """
    found = []
    for path in dict.fromkeys(path for adapter in library.adapters for path in adapter):
        modules = [adapter.get(path) for adapter in library.adapters]
        loras = [module for module in modules if isinstance(module, LoRA)]
        units = [np.asarray(prototypes(m.a, m.b)) for m in loras]
        found += [
            np.abs(np.sum(x * y, axis=-1)).mean() for n, x in enumerate(units) for y in units[:n]
        ]
    return float(np.mean(found)) if found else 0.0


def _over(part: jax.Array, whole: jax.Array) -> float:
    return float(part / jnp.where(whole > 0, whole, 1))

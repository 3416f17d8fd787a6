"""What a composition did to its modules, in numbers: how large, how alike, and what it is made of.

Everything is measured on deltas, from their factors. What no input alone accounts for, and what is
still the first draw of a factor, are the two artefacts of factor-space arithmetic: see
`compose.controls` for the experiments that rule them out.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from compose import diagnose_artefacts as artefacts
from compose.arithmetic import Space
from compose.functions import Value
from compose.geometry import cosine, norm
from compose.library import Library
from compose.lowrank import svd
from compose.recipe.problems import Source
from compose.recipe.run import evaluate
from compose.recipe.value import (
    Expression,
    Recipe,
    described,
    needed,
    refuse_missing,
    weighing,
)
from compose.routing.directions import prototypes
from compose.summary import members
from compose.syntax import names, refuse_unknown
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA

Inputs = Mapping[str, Value]

RESULT = "result"  # what an expression makes


@dataclass(frozen=True)
class Result:
    """One of the things that a composition makes: how, and of what."""

    made_by: str
    space: str  # of the steps behind it: "delta", "factor" or "delta and factor"
    inputs: tuple[str, ...]  # that it rests on
    routed: bool


@dataclass(frozen=True)
class Routed:
    """How the tokens of a text are routed over a result's modules."""

    modules: tuple[str, ...]
    top_k: int  # modules that one token reads
    projections: dict[str, dict[str, np.ndarray]]  # as `routing_statistics` has them


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a composition, by the names that modules have in its tables."""

    composition: str  # the expression, or the recipe's file
    results: dict[str, Result]
    modules: dict[str, tuple[str, ...]]  # of every input, then of every result
    norms: dict[str, float]  # of what each module adds, in that order
    cosines: np.ndarray  # (K, K) between what they add, in the order of `norms`
    effective_ranks: dict[str, float]  # mean over projections and layers
    prototypes: np.ndarray  # (K, K), the mean size of the cosine between their prototypes
    origins: dict[str, str]  # the input's module that a result's module was made of, where told
    interaction: dict[str, float]  # of results: the share that no input alone accounts for
    gap: dict[str, float]  # of results: how far the other space's is, over delta space's norm
    initial: dict[str, float]  # share of a's that is their first draw
    routing: dict[str, Routed] = field(default_factory=dict)  # by result, where a text was read


@dataclass(frozen=True)
class Pair:
    """Two modules of one library: the cosine of their prototypes, before and after."""

    modules: tuple[str, str]
    before: float | None
    after: float | None


def diagnose(
    text: str,
    inputs: Inputs,
    *,
    space: Space = "delta",
    initial: Mapping[str, Adapter] | None = None,
) -> Diagnosis:
    """The diagnosis of an expression over its inputs; what it makes is called result.

    `initial` maps an input's name to its state before training (`compose.controls.untrained`).
    """
    return diagnose_recipe(as_recipe(text, inputs, space), inputs, initial=initial)


def as_recipe(text: str, inputs: Mapping[str, object], space: Space) -> Recipe:
    """The recipe whose one step is an expression."""
    refuse_unknown(text, inputs)
    if RESULT in inputs:
        raise InputError(f"an input is called {RESULT}; give it another name")
    used = {name: "" for name in inputs if name in names(text)}
    steps = {RESULT: Expression(text)}
    return Recipe(used, steps, {RESULT: RESULT}, space=space, source=Source(text, text))


def diagnose_recipe(
    recipe: Recipe, inputs: Inputs, *, initial: Mapping[str, Adapter] | None = None
) -> Diagnosis:
    """The diagnosis of the steps that a recipe's outputs hold, each against the inputs behind it.

    The recipe is in order (`compose.recipe.check`). A library's modules are measured one by one, as
    name.member; `initial` is by these names.
    """
    refuse_missing(recipe, inputs)
    inputs = {name: inputs[name] for name in recipe.inputs if name in needed(recipe)}
    shares, values = dict(initial or {}), evaluate(recipe, inputs)
    weights = {name: inputs.pop(name) for name in weighing(recipe) if name in inputs}
    values = {step: values[step] for step in recipe.outputs.values()}
    rows = {name: members(name, value) for name, value in (inputs | values).items()}
    every = [row for named in rows.values() for row in named]
    _refuse_twice([label for label, _ in every])
    origins, interaction, gap = {}, {}, {}
    first = {name: initial_share(a, shares[name]) for name, a in every if name in shares}
    results = {step: _result(recipe, step, value) for step, value in values.items()}
    for step, result in results.items():
        part = replace(recipe, outputs={step: step})
        behind = {name: inputs[name] for name in result.inputs}
        alone = artefacts.alone(part, step, behind, weights)
        drawn = [shares[n] for name in behind for n, _ in rows[name] if n in shares]
        origins |= artefacts.origins(rows[step], alone, {name: rows[name] for name in behind})
        interaction |= artefacts.interaction(rows[step], alone)
        gap |= artefacts.gap(part, step, behind | weights, rows[step])
        if drawn:
            first |= {n: max(initial_share(a, d) for d in drawn) for n, a in rows[step]}
    adapters = [adapter for _, adapter in every]
    return Diagnosis(
        recipe.source.file,
        results,
        {name: tuple(label for label, _ in named) for name, named in rows.items()},
        {name: float(norm(adapter)) for name, adapter in every},
        _cosines(adapters),
        {name: effective_rank(adapter) for name, adapter in every},
        prototype_cosines(adapters),
        origins,
        interaction,
        gap,
        first,
    )


def _refuse_twice(labels: list[str]) -> None:
    """Refuses modules that tables could not tell apart."""
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InputError(f"two modules are called {twice[0]}; give the input another name")


def _result(recipe: Recipe, step: str, value: Value) -> Result:
    """How a step is made, of what, and whether its modules are routed."""
    behind = needed(recipe, [step])
    return Result(
        described(recipe.steps[step]),
        artefacts.space_of(recipe, step),
        tuple(name for name in recipe.inputs if name in behind - weighing(recipe)),
        isinstance(value, Library) and value.routing is not None,
    )


def prototype_pairs(found: Diagnosis) -> dict[str, list[Pair]]:
    """The pairs of modules within every library, by the name of an input or a result."""
    order = {name: n for n, name in enumerate(found.norms)}

    def between(x: str | None, y: str | None) -> float | None:
        """The cosine of the prototypes of two modules; None where it is not told which."""
        if x is None or y is None or x == y:
            return None
        return float(found.prototypes[order[x], order[y]])

    table: dict[str, list[Pair]] = {}
    for library, modules in found.modules.items():
        for x, y in combinations(modules, 2):
            made = library in found.results
            before = (found.origins.get(x), found.origins.get(y)) if made else (x, y)
            pair = Pair((x, y), between(*before), between(x, y) if made else None)
            table.setdefault(library, []).append(pair)
    return table


def by_layer(routed: Routed) -> np.ndarray:
    """The mean entropy of a token's weights in nats, (N,): over the tokens and the projections."""
    return np.mean([np.ravel(found["entropy"]) for found in routed.projections.values()], axis=0)


def balance(routed: Routed) -> np.ndarray:
    """The entropy of the modules' mean weights in nats, (N,): over the projections."""
    shares = [np.atleast_2d(found["share"]) for found in routed.projections.values()]
    return np.mean([np.sum(scipy.special.entr(share), axis=-1) for share in shares], axis=0)


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


def initial_share(adapter: Adapter, initial: Adapter) -> float:
    """The share of its a's squared norm that lies in the span of their first draws' columns.

    Over all projections: 1 where every column is as it was drawn or a mixture of such, however
    many there are; rank / width for a module that has nothing to do with the draw.
    """
    along, whole = 0.0, 0.0
    for path, module in adapter.items():
        first = initial.get(path)
        if not isinstance(module, LoRA) or not isinstance(first, LoRA):
            continue
        a, drawn = (np.asarray(m.a, np.float64) for m in (module, first))
        u, s, _ = np.linalg.svd(drawn, full_matrices=False)
        span = u * (s > 1e-6 * s[..., :1])[..., None, :]
        along += float(np.sum((np.swapaxes(span, -1, -2) @ a) ** 2))
        whole += float(np.sum(a**2))
    return along / whole if whole else 0.0


def alignment(library: Library) -> float:
    """The mean of `prototype_cosines` between two modules of a library; 0 for a library of one."""
    found = prototype_cosines(library.adapters)
    pairs = found[np.tril_indices(len(found), -1)]
    return float(pairs.mean()) if pairs.size else 0.0


def prototype_cosines(adapters: Sequence[Adapter]) -> np.ndarray:
    """The mean size of the cosine between the prototypes of every two adapters, (K, K).

    Over the layers of the projections that both change; 0 where there are none. The less it is, the
    better Arrow can tell the two apart.
    """
    units = [
        {p: np.asarray(prototypes(m.a, m.b)) for p, m in adapter.items() if isinstance(m, LoRA)}
        for adapter in adapters
    ]

    def between(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> float:
        """The mean over the layers of all projections of two."""
        found = [np.ravel(np.abs(np.sum(x[p] * y[p], axis=-1))) for p in x if p in y]
        return float(np.concatenate(found).mean()) if found else 0.0

    return _square(between, units)


def _cosines(adapters: Sequence[Adapter]) -> np.ndarray:
    """The cosines between what adapters add, (K, K); 0 between modules of two kinds."""

    def between(x: Adapter, y: Adapter) -> float:
        """The cosine of two."""
        try:
            return float(cosine(x, y))
        except InputError:
            return 0.0

    return _square(between, adapters)


def _square(between: Callable[[Any, Any], float], things: Sequence[Any]) -> np.ndarray:
    """What is between every two things, (K, K), each pair computed once."""
    found = np.zeros((len(things), len(things)))
    for i, x in enumerate(things):
        for j, y in enumerate(things[: i + 1]):
            found[i, j] = found[j, i] = between(x, y)
    return found

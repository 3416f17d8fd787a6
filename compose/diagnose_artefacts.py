"""What in a result is of no input alone, what each of its modules was made of, and what the other
space would have made: all found by running its recipe again.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from compose.arithmetic import Space, subtract, weighted_sum
from compose.functions import Value
from compose.geometry import norm
from compose.recipe.run import evaluate
from compose.recipe.value import Recipe, needed
from compose.summary import Named, members
from lora_jax.errors import InputError

Inputs = Mapping[str, Value]


def space_of(recipe: Recipe, step: str) -> str:
    """The space of the steps behind a step: "delta", "factor" or "delta and factor"."""
    behind = needed(recipe, [step])
    spaces = {s.space or recipe.space for name, s in recipe.steps.items() if name in behind}
    return " and ".join(sorted(spaces))


def alone(recipe: Recipe, step: str, inputs: Inputs, weights: Inputs) -> dict[str, list[Named]]:
    """What a step makes of each input with the others silent; nothing if it refuses zeros.

    `weights` are inputs that weigh the others, as Fisher information does: they stay as they are.
    """
    silent = {name: jax.tree.map(jnp.zeros_like, value) for name, value in inputs.items()}
    try:
        made = {
            name: evaluate(recipe, {**weights, **silent, name: value})[step]
            for name, value in inputs.items()
        }
    except InputError:
        return {}
    return {name: members(step, value) for name, value in made.items()}


def interaction(after: list[Named], alone: Mapping[str, list[Named]]) -> dict[str, float]:
    """The norm of each module less what every input gives alone, over its norm.

    In factor space these are the cross terms; sums of deltas have none.
    """
    found = {}
    for n, (name, adapter) in enumerate(after if alone else []):
        parts = [rows[n][1] for rows in alone.values()]
        rest = weighted_sum([adapter, *parts], [1.0] + [-1.0] * len(parts), space="delta")
        found[name] = _over(norm(rest), norm(adapter))
    return found


def origins(
    after: list[Named], alone: Mapping[str, list[Named]], before: Mapping[str, list[Named]]
) -> dict[str, str]:
    """The input's module that each module of a library was made of, where that can be told.

    Among the inputs that make some of it alone, it is the one of its name (or the member of its
    name), or else the only one that the library's other modules do not all rest on too.
    """
    found = {}
    makers = [
        {name for name, rows in alone.items() if float(norm(rows[n][1])) > 0}
        for n in range(len(after))
    ]
    for n, (label, _) in enumerate(after if len(after) > 1 else []):
        own = [row for name in before if name in makers[n] for row in before[name]]
        member = label.partition(".")[2]
        named = [name for name, _ in own if member in (name, name.partition(".")[2])]
        rest = set.intersection(*makers)
        single = [name for name in makers[n] - rest if len(before[name]) == 1]
        if len(named) == 1 or len(single) == 1:
            found[label] = named[0] if len(named) == 1 else before[single[0]][0][0]
    return found


def gap(recipe: Recipe, step: str, inputs: Inputs, after: list[Named]) -> dict[str, float]:
    """How far each module is from the one of the other space, over the norm of delta space's.

    Nothing if the other space refuses a step.
    """
    other: Space = "factor" if space_of(recipe, step) == "delta" else "delta"
    steps = {name: replace(one, space=other) for name, one in recipe.steps.items()}
    try:
        value = evaluate(replace(recipe, steps=steps), inputs)[step]
    except InputError:
        return {}
    rows = members(step, value)
    exact = rows if other == "delta" else after
    triples = zip(after, rows, exact, strict=True)
    return {
        name: _over(norm(subtract(x, y, space="delta")), norm(whole))
        for (name, x), (_, y), (_, whole) in triples
    }


def _over(part: jax.Array, whole: jax.Array) -> float:
    return float(part / jnp.where(whole > 0, whole, 1))

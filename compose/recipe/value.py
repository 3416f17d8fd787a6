"""A recipe as a value, and what its steps use."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from compose.arithmetic import Space
from compose.recipe.problems import Source
from compose.syntax import names, parse
from compose.weights import Weight
from lora_jax.errors import InputError

# A member's weight: a number, numbers over depth, or either by pattern of the projection's path.
Depth = Weight | list[float] | tuple[float, ...]
Share = Depth | Mapping[str, Depth]

SPACES = get_args(Space)
FISHERS = "fishers"  # the one option that names inputs and steps, as members do


@dataclass(frozen=True)
class Expression:
    """A step written as on the command line: "both - 0.4*wiki"."""

    text: str
    space: Space | None = None  # the recipe's, unless given
    rank: int | None = None  # to which the result is recompressed


@dataclass(frozen=True)
class Method:
    """A step that applies a method of `compose.recipe.methods` to named modules."""

    name: str
    members: tuple[str, ...]  # inputs and earlier steps; a library stands for its modules
    weights: tuple[Share, ...] | None = None  # one a member
    space: Space | None = None
    rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


Step = Expression | Method


@dataclass(frozen=True)
class Recipe:
    """A composition: inputs by name, steps in the order in which they run, outputs by folder."""

    inputs: Mapping[str, str]  # folders of adapters and libraries, or hf://USER/REPO
    steps: Mapping[str, Step]
    outputs: Mapping[str, str]  # the step that each folder is to hold
    base: str | None = None  # the base model, for its shapes; else the one that the inputs name
    space: Space = "delta"
    source: Source = field(default=Source("recipe", ""), compare=False, repr=False)


def used(step: Step) -> list[str]:
    """The inputs and steps that a step is made of, each once."""
    if isinstance(step, Expression):
        return sorted(names(step.text))
    return list(dict.fromkeys([*step.members, *step.options.get(FISHERS, ())]))


def weighing(recipe: Recipe) -> set[str]:
    """The inputs that are Fisher information alone: what methods weigh by, and no modules."""
    weigh, merged = set(), set()
    for step in recipe.steps.values():
        inside = set(step.options.get(FISHERS, ())) if isinstance(step, Method) else set()
        if isinstance(step, Expression):
            inside = _fishers_of(step.text)
        weigh |= inside
        merged |= set(used(step)) - inside
    return (weigh - merged) & recipe.inputs.keys()


def _fishers_of(text: str) -> set[str]:
    """The names in an expression's fishers=[...]."""
    found = [node for node in parse(text).find_data("keyword") if node.children[0] == FISHERS]
    return {str(part.children[0]) for node in found for part in node.find_data("name")}


def needed(recipe: Recipe, outputs: Iterable[str] | None = None) -> set[str]:
    """The inputs and steps that the outputs rest on; or the steps in `outputs`, if given."""
    wanted = set(recipe.outputs.values() if outputs is None else outputs)
    for name, step in reversed(list(recipe.steps.items())):
        if name in wanted:
            wanted |= set(used(step))
    return wanted


def refuse_missing(recipe: Recipe, inputs: Collection[str]) -> None:
    """Refuses inputs in memory that lack one which an output needs."""
    wanted = needed(recipe)
    if missing := [name for name in recipe.inputs if name in wanted and name not in inputs]:
        raise InputError(f"no module for the input {', '.join(missing)}; give one by that name")


def reached(recipe: Recipe, name: str) -> set[str]:
    """All that a step is made of, as far as its recipe can be read; of an input, nothing."""
    found, left = set(), [name]
    while left:
        step = recipe.steps.get(left.pop())
        try:
            parts = [] if step is None else used(step)
        except InputError:
            parts = []
        left += [part for part in parts if part not in found]
        found |= set(parts)
    return found


def described(step: Step) -> str:
    """What a step does, in one line: its expression, or "ties of a (1), b (0.5); density 0.3"."""
    if isinstance(step, Expression):
        return "; ".join(filter(None, (step.text, settings(step))))
    shares = [""] * len(step.members)
    if step.weights is not None:
        shares = [f" ({told_share(share)})" for share in step.weights]
    members = ", ".join(map("".join, zip(step.members, shares, strict=True)))
    return "; ".join(filter(None, (f"{step.name} of {members}", settings(step))))


def told_share(share: Share) -> str:
    """A weight in a few characters: "0.5", "0 to 1", "*.q_proj 0.5, * 1"."""
    if isinstance(share, Mapping):
        return ", ".join(f"{pattern} {told_share(value)}" for pattern, value in share.items())
    if isinstance(share, list | tuple):
        return " to ".join(f"{point:g}" for point in share)
    return f"{share:g}"


def settings(step: Step) -> str:
    """A step's options, rank and space as far as they are given: "density 0.3, rank 16"."""
    said = dict(step.options) if isinstance(step, Method) else {}
    said |= {k: v for k, v in (("rank", step.rank), ("space", step.space)) if v is not None}
    told = {k: " and ".join(v) if k == FISHERS else v for k, v in said.items()}
    return ", ".join(f"{key} {value}" for key, value in told.items())

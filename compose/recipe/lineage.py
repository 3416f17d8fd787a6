"""How a module came to be, from its provenance: a graph of trained modules, steps and outputs.

The record beside a module (provenance.json) holds its own expression or recipe, and those of its
inputs that were themselves composed or trained, by sha256. So the graph reaches back as far as they
do, even where their folders are gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from compose.recipe.drawing import svg
from compose.recipe.layout import placed
from compose.recipe.read import parsed_text
from compose.recipe.value import (
    Expression,
    Method,
    Recipe,
    Step,
    needed,
    settings,
    told_share,
    used,
)
from lora_jax.errors import InputError

FILE = "lineage.svg"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """A box of the graph: its kind ("input", "step" or "output") and its lines, a name first."""

    kind: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Boxes by their ids, and arrows between them with what they bear; no arrow leads back."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], str] = field(default_factory=dict)


def drawn(record: Record, output: str) -> str:
    """The graph of a module called `output` whose provenance is `record`, as SVG."""
    found = graph(record, output)
    return svg(found.nodes, found.edges, placed(found.nodes, found.edges))


def graph(record: Record, output: str) -> Graph:
    """The graph of a module called `output` whose provenance is `record`."""
    found = Graph()
    last = _composed(record, record.get("ancestors", {}), (), found)
    found.nodes["output"] = Node("output", (output,))
    found.edges[last, "output"] = ""
    return found


def _composed(
    record: Record, ancestors: Mapping[str, Record], below: tuple[str, ...], found: Graph
) -> str:
    """Adds what a record tells to the graph; the id of the step that made its module.

    `below` has the sha256 of the modules on the way to the output, of which this is the last. A
    step's id is a hash of all it rests on, so that two records of one recipe share their steps.
    """
    recipe, wanted = _recipe(record)
    ids: dict[str, str] = {}
    for name, step in recipe.steps.items():
        if name not in needed(recipe, [wanted]):
            continue
        for part in used(step):
            if part not in ids:
                told = record["inputs"].get(part, {"path": "", "sha256": f"unknown {part}"})
                ids[part] = _input(part, told, recipe, ancestors, below, found)
        lines, borne = _lines(name, step, recipe), {ids[p]: _weight(step, p) for p in used(step)}
        ids[name] = sha256(repr((lines, borne)).encode()).hexdigest()
        found.nodes[ids[name]] = Node("step", lines)
        found.edges.update({(part, ids[name]): weight for part, weight in borne.items()})
    return ids[wanted]


def _input(
    name: str,
    told: Mapping[str, str],
    recipe: Recipe,
    ancestors: Mapping[str, Record],
    below: tuple[str, ...],
    found: Graph,
) -> str:
    """Adds an input, and before it what it was made of; its id."""
    digest = told["sha256"]
    made = ancestors.get(digest, {})
    again = digest in below  # a copy of what was composed from it
    key = f"{digest} again" if again else digest
    if key in found.nodes:
        return key
    place = recipe.inputs.get(name) or told["path"]
    run = made.get("training", {})
    data = [Path(source).name for source in run.get("data", [])]
    did = "Fisher information on" if run.get("fisher") else "trained on"
    trained = (f"{did} {', '.join(data)}",) if data else ()
    found.nodes[key] = Node("input", (name, place, *trained))
    if not again and "inputs" in made:
        found.edges[_composed(made, ancestors, (*below, digest), found), key] = ""
    return key


def _recipe(record: Record) -> tuple[Recipe, str]:
    """A record's recipe and the name of its step; an expression is a recipe of one."""
    try:
        if "recipe" in record:
            recipe, _ = parsed_text(record["recipe"], "recipe")
            needed(recipe, [record["step"]])
            if record["step"] in recipe.steps:
                return recipe, record["step"]
        else:
            step = Expression(record["expression"], record.get("space"), record.get("rank"))
            recipe = Recipe({}, {"": step}, {})
            needed(recipe, [""])
            return recipe, ""
    except InputError:
        pass  # of another version, or written by hand: what it rests on is known all the same
    return Recipe({}, {"": Method("composed", tuple(record["inputs"]))}, {}), ""


def _lines(name: str, step: Step, recipe: Recipe) -> tuple[str, ...]:
    """What a step is called and what it does."""
    in_factors = (step.space or recipe.space) == "factor"
    step = replace(step, space="factor" if in_factors else None)
    what = step.text if isinstance(step, Expression) else step.name
    return tuple(filter(None, (name, what, settings(step))))


def _weight(step: Step, part: str) -> str:
    """What an arrow bears: the weight of a member in a method."""
    if isinstance(step, Expression) or step.weights is None:
        return ""
    pairs = zip(step.members, step.weights, strict=False)
    return " and ".join(told_share(share) for member, share in pairs if member == part)

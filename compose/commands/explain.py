"""`lora-compose explain`: measured facts and advice on the screen, and as JSON."""

from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compose.commands.arguments import Explain
from compose.commands.given import MANY, given, seed_of
from compose.explain import explained
from compose.facts import Facts, measured
from lora_jax.errors import InputError
from lora_jax.files import write_json
from lora_jax.runtime import prepare


def run(command: Explain) -> None:
    """Prints the facts, a table of pairs if they are few, and a sentence for each rule."""
    if command.json is not None and command.json.exists() and not command.overwrite:
        raise InputError(f"{command.json} exists; choose another --json or pass --overwrite")
    prepare()
    found = given(command.inputs, command.base)
    facts = measured(found.modules, {name: seed_of(f) for name, f in found.folders.items()})
    told = explained(facts)
    if command.json is not None:
        write_json(command.json, as_json(facts, told))
    console = Console(highlight=False, markup=False)
    console.print(modules(facts))
    if facts.cosines is not None and 1 < len(facts.names) <= MANY:
        console.print(pairs(facts))
    for sentence in told:
        console.print(sentence.replace("`", ""))


def as_json(facts: Facts, told: list[str]) -> dict[str, Any]:
    """The facts as JSON values, with the sentences."""
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(facts).items()
    }
    return {**plain, "words": told}


def modules(facts: Facts) -> Table:
    """A row for every module."""
    table = Table("module", "kind", "rank", "scale", "changes", "init seed", "norm")
    for n, name in enumerate(facts.names):
        table.add_row(
            name,
            " + ".join(facts.kinds[n]),
            ", ".join(map(str, facts.ranks[n])),
            ", ".join(f"{scale:g}" for scale in facts.scales[n]),
            ", ".join(path.rsplit(".", 1)[-1] for path in facts.targets[n]),
            "" if facts.seeds[n] is None else str(facts.seeds[n]),
            f"{facts.norms[n]:.4g}" if facts.norms else "-",
        )
    return table


def pairs(facts: Facts) -> Table:
    """A row for every two modules: cosines of what they add and of their a's, and overlaps."""
    shown = {
        "cosine": facts.cosines,
        "of a's": facts.factors,
        "inputs overlap": facts.inputs,
        "outputs overlap": facts.outputs,
    }
    there = {name: matrix for name, matrix in shown.items() if matrix is not None}
    table = Table("pair", *there)
    for one, other in combinations(range(len(facts.names)), 2):
        values = (f"{matrix[one, other]:.3f}" for matrix in there.values())
        table.add_row(f"{facts.names[one]}, {facts.names[other]}", *values)
    return table

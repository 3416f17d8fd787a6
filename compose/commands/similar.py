"""`lora-compose similar`: a matrix of similarities, and what is nearest to what."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compose.commands.arguments import Similar
from compose.commands.given import MANY, given
from compose.figures import draw_similarity
from compose.library import Library
from compose.similarity import Similarity, similarity
from lora_jax.errors import InputError, nearest
from lora_jax.files import new_folder, refuse_existing, write_json
from lora_jax.runtime import prepare

FILE, FIGURE = "similarity.json", "similarity.png"


def run(command: Similar) -> None:
    """Prints the matrix if it is small, and each module's neighbours, the nearest first."""
    if command.out is not None:
        refuse_existing(command.out, command.overwrite)
    prepare()
    modules = given(command.inputs, command.base).modules
    if command.to is not None and command.to not in modules:
        raise InputError(f"--to {command.to}: no such module; {nearest(command.to, modules)}")
    found = similarity(Library(tuple(modules), tuple(modules.values())), command.measure)
    if command.out is not None:
        with new_folder(command.out, command.overwrite) as scratch:
            write_json(scratch / FILE, as_json(found))
            draw_similarity(found, scratch / FIGURE)
    console = Console(highlight=False, markup=False)
    if len(modules) <= MANY and command.to is None:
        console.print(matrix(found))
    console.print(neighbours(found, found.names if command.to is None else (command.to,)))
    if command.out is not None:
        print(command.out)


def as_json(found: Similarity) -> dict[str, Any]:
    """The similarities as JSON values."""
    parts = {path: values.tolist() for path, values in found.projections.items()}
    return {
        "measure": found.measure,
        "names": found.names,
        "overall": found.overall.tolist(),
        "projections": parts,
    }


def matrix(found: Similarity) -> Table:
    """The similarities of all pairs, overall."""
    table = Table(found.measure, *found.names)
    for name, row in zip(found.names, found.overall, strict=True):
        table.add_row(name, *(f"{value:+.3f}" for value in row))
    return table


def neighbours(found: Similarity, names: tuple[str, ...], count: int = 5) -> Table:
    """For each of the names, the other modules, the nearest first."""
    table = Table("module", f"nearest by {found.measure}")
    for name in names:
        here = found.names.index(name)
        order = [n for n in np.argsort(-found.overall[here], kind="stable") if n != here]
        shown = [f"{found.names[n]} {found.overall[here, n]:+.3f}" for n in order]
        table.add_row(name, "\n".join(shown) if len(names) == 1 else ", ".join(shown[:count]))
    return table

"""What `lora-compose` does with a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compose import summary
from compose.cli import Command
from compose.functions import Value
from compose.inputs import named_folders
from compose.library import Library
from compose.recipe.check import notes
from compose.recipe.folders import folder_faults
from compose.recipe.plan import plan
from compose.recipe.problems import refuse
from compose.recipe.read import parsed, with_inputs
from compose.recipe.run import Made, read_inputs, write_outputs
from compose.recipe.value import Recipe, described
from lora_jax.errors import refuse_all
from lora_jax.modules import describe
from lora_jax.progress import say
from lora_jax.runtime import prepare

ENDINGS = (".yaml", ".yml")


def is_recipe(text: str, inputs: Sequence[str]) -> bool:
    """Whether what is to be composed is a recipe's file, not an expression.

    A name may end in .yaml too: with inputs given, the file must be there.
    """
    return text.endswith(ENDINGS) and (not inputs or Path(text).expanduser().is_file())


def run(command: Command) -> None:
    """Runs a recipe, or tells what it would do, once all of it is in order."""
    _refuse_flags(command)
    recipe, problems = parsed(Path(command.expression).expanduser())
    recipe = with_inputs(recipe, named_folders(command.inputs))
    refuse([*problems, *folder_faults(recipe, command.overwrite)], recipe.source)
    for note in notes(recipe):
        say(f"note: {note}")
    prepare()
    inputs = read_inputs(recipe)
    planned = plan(recipe, inputs.values)
    if command.dry_run:
        return _print(recipe, inputs.values, Made(planned, {}))
    made = write_outputs(recipe, inputs, overwrite=command.overwrite)
    _print(recipe, inputs.values, made)
    for folder in recipe.outputs:
        print(folder)


def _refuse_flags(command: Command) -> None:
    """Refuses flags whose place is in the recipe."""
    usual = {"out": None, "space": "delta", "rank": None, "base": None, "merged": False}
    instead = {
        "out": "a recipe's folders stand under its outputs",
        "rank": "say rank: in a step",
        "merged": "merge an output afterwards, lora-compose m m=FOLDER --merged",
    }
    problems = [
        f"--{name} goes with an expression; {instead.get(name, f'say {name}: in the recipe')}"
        for name, value in usual.items()
        if getattr(command, name) != value
    ]
    refuse_all(problems, command.expression)


def _print(recipe: Recipe, inputs: Mapping[str, Value], made: Made) -> None:
    """Prints what went in and what every step makes; norms and losses once they are known."""
    table = Table()
    table.add_column("name", overflow="fold")
    table.add_column("made by", overflow="fold")
    table.add_column("what it is")
    if made.errors:
        table.add_column("norm", justify="right")
        table.add_column("lost to rank", justify="right")
    for name, value in inputs.items():
        _rows(table, name, recipe.inputs[name], value, made)
    table.add_section()
    for name, value in made.values.items():
        _rows(table, name, described(recipe.steps[name]), value, made)
    for folder, step in recipe.outputs.items():
        table.add_row(folder, f"holds {step}", end_section=False)
    Console(highlight=False, markup=False).print(table)


def _rows(table: Table, name: str, how: str, value: Value, made: Made) -> None:
    """Adds a row of a module, or one of each of a library's."""
    errors = made.errors.get(name, {})
    for n, (label, adapter) in enumerate(summary.members(name, value)):
        member = value.names[n] if isinstance(value, Library) else ""
        lost = summary.lost(errors[member]) if member in errors else ""
        known = [summary.length(adapter), lost] if made.errors else []
        table.add_row(label, "" if n else how, describe(adapter), *known)

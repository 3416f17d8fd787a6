"""What is compared: the base, adapters, libraries and recipes, as named columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from compose.arithmetic import Space
from compose.expression import evaluate, ready
from compose.inputs import load_input
from compose.interpreter import Inputs
from compose.library import Library
from compose.recipe import evaluate as run_recipe
from compose.recipe.command import is_recipe
from compose.recipe.problems import refuse
from compose.recipe.read import parsed_text, read_text
from compose.recipe.run import read_inputs
from compose.recipe.value import needed
from eval import sweep
from eval.sweep import Setting, Sweep
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

BASE = "base"
Known = dict[tuple, Inputs]  # modules by a recipe's base and the inputs that it needs
_LABELLED = re.compile(r"\s*([\w.+-]+)\s*=\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """One of the things compared, and the recipe that made it."""

    name: str
    recipe: str
    adapter: Adapter
    setting: Setting = field(default_factory=dict)  # of the numbers that its recipe leaves open
    group: str = ""  # what it is called apart from them


def build(
    recipes: Sequence[str],
    folders: Mapping[str, Path],
    config: models.Config,
    space: Space,
    swept: Sweep = MappingProxyType({}),
) -> list[Column]:
    """The columns of `recipes`, or the base and every adapter if there is none.

    A recipe is an expression over the adapters' names and `base`, as in `compose.expression`, or a
    recipe's file (.yaml), whose outputs are columns; or `label=` either. Numbers that it leaves
    open, {x}, take all the values that are swept, a column each. A library that is not routed gives
    a column for each of its modules.
    """
    inputs = {BASE: {}} | {name: load_input(path, config) for name, path in folders.items()}
    columns: list[Column] = []
    written = [_written(recipe) for recipe in recipes or inputs]
    sweep.refuse_unused([text for _, text, _ in written], swept)
    known: Known = {}
    for name, text, file in written:
        for setting in sweep.settings(text, swept):
            whole = sweep.filled(text, setting)
            made = _of_file(whole, file, known) if file else _of_text(whole, inputs, space)
            for member, value in made.items():
                group = ".".join(filter(None, (name, member)))
                shown = f"{group} {sweep.told(setting)}" if setting else group
                columns += _members(Column(shown, whole, {}, setting, group), value)
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two columns are called {twice[0]!r}; label one as NAME={twice[0]}")
    return columns


def _written(recipe: str) -> tuple[str, str, str]:
    """A column's name, the text of its recipe, and the file that holds it, if one does."""
    labelled = _LABELLED.fullmatch(recipe)
    name, text = labelled.groups() if labelled else ("", recipe)
    if not is_recipe(text, ()):
        return name or recipe, text, ""
    path = Path(text).expanduser()
    return name or path.stem, read_text(path), str(path)


def _of_text(text: str, inputs: Inputs, space: Space) -> dict[str, Adapter | Library]:
    """What an expression describes."""
    return {"": {} if text == BASE else evaluate(text, inputs, space=space)}


def _of_file(text: str, file: str, known: Known) -> dict[str, Adapter | Library]:
    """What a recipe's outputs are, by their folders' names; one alone has none.

    Inputs are read once for all settings: `known` keeps them.
    """
    recipe, problems = parsed_text(text, file)
    refuse(problems, recipe.source)
    wanted = needed(recipe)
    read = (recipe.base, *((n, folder) for n, folder in recipe.inputs.items() if n in wanted))
    if read not in known:
        known[read] = read_inputs(recipe).values
    made = run_recipe(recipe, known[read])
    alone = len(recipe.outputs) == 1
    return {
        "" if alone else Path(folder).name: ready(made[step])
        for folder, step in recipe.outputs.items()
    }


def _members(column: Column, value: Adapter | Library) -> list[Column]:
    """A value as one column, or an unrouted library as one for each module."""
    if not isinstance(value, Library):
        return [replace(column, adapter=value)]
    pairs = zip(value.names, value.adapters, strict=True)
    return [
        replace(
            column,
            name=f"{column.name}.{member}",
            adapter=adapter,
            group=f"{column.group}.{member}",
        )
        for member, adapter in pairs
    ]

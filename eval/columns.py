"""What is compared: the base, adapters, libraries and recipes, as named columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compose.arithmetic import Space
from compose.expression import evaluate
from compose.inputs import load_input
from compose.library import Library
from compose.syntax import NAME
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

BASE = "base"
_LABELLED = re.compile(r"\s*([\w.+-]+)\s*=\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """One of the things compared, and the recipe that made it."""

    name: str
    recipe: str
    adapter: Adapter


def read_paths(given: Sequence[str]) -> dict[str, Path]:
    """The folders of `NAME=FOLDER` arguments, by name."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not NAME.fullmatch(name):
            raise InputError(
                f"{text!r} is not NAME=FOLDER; a name is letters, digits, _ and ., no digit first"
            )
        if name == BASE or name in folders:
            raise InputError(f"the adapter name {name!r} is taken; choose another")
        folders[name] = Path(folder).expanduser()
    return folders


def build(
    recipes: Sequence[str], folders: Mapping[str, Path], config: models.Config, space: Space
) -> list[Column]:
    """The columns of `recipes`, or the base and every adapter if there is none.

    A recipe is an expression over the adapters' names and `base`, as in `compose.expression`, or
    `label=expression`. A library that is not routed gives a column for each of its modules.
    """
    inputs = {BASE: {}} | {name: load_input(path, config) for name, path in folders.items()}
    columns: list[Column] = []
    for recipe in recipes or inputs:
        labelled = _LABELLED.fullmatch(recipe)
        name, text = labelled.groups() if labelled else (recipe, recipe)
        value = {} if text == BASE else evaluate(text, inputs, space=space)
        columns += _members(name, text, value)
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two columns are called {twice[0]!r}; label one as NAME={twice[0]}")
    return columns


def _members(name: str, recipe: str, value: Adapter | Library) -> list[Column]:
    if not isinstance(value, Library):
        return [Column(name, recipe, value)]
    pairs = zip(value.names, value.adapters, strict=True)
    return [Column(f"{name}.{member}", recipe, adapter) for member, adapter in pairs]

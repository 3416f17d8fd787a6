"""What is compared: the base, adapters, libraries and recipes, as named columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compose.arithmetic import Space
from compose.expression import evaluate
from compose.inputs import load_input
from compose.library import Library
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
    """A value as one column, or an unrouted library as one for each module."""
    if not isinstance(value, Library):
        return [Column(name, recipe, value)]
    pairs = zip(value.names, value.adapters, strict=True)
    return [Column(f"{name}.{member}", recipe, adapter) for member, adapter in pairs]

"""A recipe to YAML, as `read` reads it."""

from collections.abc import Mapping
from typing import Any

from compose.recipe.value import Expression, Recipe, Step
from compose.recipe.yaml_text import dump


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML; reading it gives an equal recipe."""
    top = {"base": recipe.base} if recipe.base is not None else {}
    top |= {"space": recipe.space} if recipe.space != "delta" else {}
    steps = {name: _step(step) for name, step in recipe.steps.items()}
    return dump(_plain({**top, "inputs": recipe.inputs, "steps": steps, "outputs": recipe.outputs}))


def _step(step: Step) -> Any:
    """A step as plain values: an expression with no more to say is its text."""
    common = {"space": step.space, "rank": step.rank}
    said = {key: value for key, value in common.items() if value is not None}
    if isinstance(step, Expression):
        return {"expression": step.text, **said} if said else step.text
    weights = {} if step.weights is None else {"weights": step.weights}
    return {step.name: step.members, **weights, **step.options, **said}


def _plain(value: Any) -> Any:
    """A value as YAML has it: lists, tables, texts, and Python's own numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value

"""What every step of a recipe will make, found without computing anything."""

from collections.abc import Mapping
from functools import partial

import jax

from compose.functions import Value
from compose.library import Library
from compose.recipe.problems import Problem, in_expression, problem, refuse
from compose.recipe.shares import ShareError
from compose.recipe.steps import made
from compose.recipe.value import Expression, Recipe, Step, needed, refuse_missing, used
from compose.syntax import ExpressionError
from lora_jax import peft
from lora_jax.errors import InputError


def plan(recipe: Recipe, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """What each step that an output needs will make: modules and libraries of abstract arrays.

    The inputs may be abstract too. Steps that their inputs cannot go through are told all at once.
    """
    refuse_missing(recipe, inputs)
    values, problems, wanted = dict(inputs), [], needed(recipe)
    for name, step in recipe.steps.items():
        parts = {part: values[part] for part in used(step) if part in values}
        if name not in wanted or len(parts) < len(used(step)):
            continue  # not needed, or made of a step that cannot be made
        try:
            values[name] = jax.eval_shape(partial(_value, step, recipe), parts)
        except InputError as error:
            problems.append(step_problem(recipe, name, step, error))
    for folder, name in recipe.outputs.items():
        try:
            _refuse_unsaved(values.get(name))
        except InputError as error:
            problems.append(problem(recipe.source, ("outputs", folder), str(error)))
    refuse(problems, recipe.source)
    return {name: value for name, value in values.items() if name in recipe.steps}


def _refuse_unsaved(value: Value | None) -> None:
    """Refuses an output that PEFT's format has no place for."""
    adapters = value.adapters if isinstance(value, Library) else [value] if value else []
    for adapter in adapters:
        peft.kind_of(adapter)


def _value(step: Step, recipe: Recipe, parts: Mapping[str, Value]) -> Value:
    """What a step makes, without what it lost."""
    return made(step, parts, recipe.space)[0]


def step_problem(recipe: Recipe, name: str, step: Step, error: InputError) -> Problem:
    """A step's error at its place in the file."""
    key = ("steps", name)
    if isinstance(error, ExpressionError) and isinstance(step, Expression):
        return in_expression(recipe.source, key, step.text, error)
    if isinstance(error, ShareError):
        return problem(recipe.source, (*key, "weights"), str(error))
    return problem(recipe.source, key, str(error), on_key=True)

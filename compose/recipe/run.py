"""A recipe carried out: its inputs read, its steps made, its outputs written with their records."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from compose import provenance
from compose.folder import save_library
from compose.functions import Value
from compose.inputs import base_and_config, load_input, located
from compose.library import Library
from compose.recipe import lineage
from compose.recipe.check import check
from compose.recipe.plan import plan, step_problem
from compose.recipe.problems import Problem, problem, refuse
from compose.recipe.steps import made
from compose.recipe.value import Recipe, needed, refuse_missing, used
from compose.recipe.write import recipe_text
from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.progress import bar
from lora_jax.wheels import published


@dataclass(frozen=True)
class Inputs:
    """What a recipe's inputs hold, as far as its outputs need them, and the base they are of."""

    folders: Mapping[str, Path]
    base: str
    config: models.Config
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Made:
    """What the steps made, and what each lost to a rank, by name."""

    values: Mapping[str, Value]
    errors: Mapping[str, provenance.Errors]


def run(recipe: Recipe, *, overwrite: bool = False) -> Made:
    """Checks a recipe, makes its steps, and writes its outputs: each whole or not at all.

    Beside every output lie its provenance and its lineage as a drawing. Nothing is written unless
    all steps went through.
    """
    check(recipe, overwrite=overwrite)
    inputs = read_inputs(recipe)
    plan(recipe, inputs.values)
    return write_outputs(recipe, inputs, overwrite=overwrite)


def evaluate(recipe: Recipe, inputs: Mapping[str, Value]) -> dict[str, Value]:
    """What each step that an output needs makes of inputs in memory; pure, and may be traced."""
    return {name: value for name, value, _ in _steps(recipe, inputs)}


def _steps(
    recipe: Recipe, inputs: Mapping[str, Value]
) -> Iterator[tuple[str, Value, provenance.Errors]]:
    """The steps that an output needs, one after another, each with what it lost."""
    refuse_missing(recipe, inputs)
    values, wanted = dict(inputs), needed(recipe)
    for name, step in recipe.steps.items():
        if name in wanted:
            parts = {part: values[part] for part in used(step)}
            try:
                values[name], errors = made(step, parts, recipe.space)
            except InputError as error:
                refuse([step_problem(recipe, name, step, error)], recipe.source)
                raise
            yield name, values[name], errors


def read_inputs(recipe: Recipe) -> Inputs:
    """The inputs that a recipe's outputs need; those that cannot be read are told all at once."""
    folders: dict[str, Path] = {}
    values: dict[str, Value] = {}
    problems: list[Problem] = []

    def each(function: Any, given: Mapping[str, Any], found: dict[str, Any]) -> None:
        """`function` of every input, its error noted where the input stands."""
        for name, value in given.items():
            try:
                found[name] = function(value)
            except InputError as error:
                problems.append(problem(recipe.source, ("inputs", name), str(error)))
        refuse(problems, recipe.source)

    wanted = needed(recipe)
    each(located, {n: f for n, f in recipe.inputs.items() if n in wanted}, folders)
    try:
        base, config = base_and_config(recipe.base, folders)
    except InputError as error:
        refuse([problem(recipe.source, ("base",), str(error))], recipe.source)
        raise
    each(lambda folder: load_input(folder, config), folders, values)
    return Inputs(folders, base, config, values)


def write_outputs(recipe: Recipe, inputs: Inputs, *, overwrite: bool = False) -> Made:
    """Makes the steps of a recipe that is in order, and writes its outputs."""
    values, errors = {}, {}
    with bar("composing") as progress:
        task = progress.add_task("steps", total=len(needed(recipe) & recipe.steps.keys()), note="")
        for name, value, lost in _steps(recipe, inputs.values):
            values[name], errors[name] = jax.block_until_ready(value), lost
            progress.update(task, advance=1, note=name)
    for folder, step in recipe.outputs.items():
        _save(recipe, inputs, Made(values, errors), folder, step, overwrite)
    return Made(values, errors)


def _save(
    recipe: Recipe, inputs: Inputs, result: Made, folder: str, step: str, overwrite: bool
) -> None:
    """Writes one output with its provenance and its lineage."""
    behind = needed(recipe, [step])
    record = provenance.record(
        {"recipe": recipe_text(recipe), "step": step},
        {name: path for name, path in inputs.folders.items() if name in behind},
        base_name=inputs.base,
        errors=_by_step({name: result.errors[name] for name in result.errors if name in behind}),
    )
    drawing = lineage.drawn(record, Path(folder).name)
    extra = {provenance.FILE: record, lineage.FILE: drawing}
    value, base = result.values[step], published(inputs.base)
    save: Any = save_library if isinstance(value, Library) else peft.save_adapter
    out = Path(folder).expanduser()
    save(out, value, inputs.config, base_name=base, extra=extra, overwrite=overwrite)


def _by_step(errors: Mapping[str, provenance.Errors]) -> provenance.Errors:
    """Truncation errors by "step", or "step.member" of a step that made a library."""
    return {
        f"{step}.{member}" if member else step: lost
        for step, by_member in errors.items()
        for member, lost in by_member.items()
    }

"""Whether the folders that a recipe names are there, and out of each other's way."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from compose.inputs import base_name, located
from compose.recipe.problems import Problem, problem
from compose.recipe.value import Recipe, reached
from lora_jax import hub
from lora_jax.errors import InputError
from lora_jax.files import refuse_existing


def folder_faults(recipe: Recipe, overwrite: bool) -> list[Problem]:
    """What is wrong with the folders: inputs that hold no module, outputs in the way.

    Only inputs that an output needs count. Those on the hub are not fetched here.
    """
    wanted = {part for name in recipe.outputs.values() for part in reached(recipe, name)}
    inputs = {name: folder for name, folder in recipe.inputs.items() if name in wanted}
    found = []
    for name, folder in inputs.items():
        try:
            hub.parse(folder) if hub.is_address(folder) else base_name(located(folder))
        except InputError as error:
            found.append(problem(recipe.source, ("inputs", name), str(error)))
    for folder in recipe.outputs:
        try:
            refuse_existing(Path(folder).expanduser(), overwrite, "choose another folder")
        except InputError as error:
            found.append(problem(recipe.source, ("outputs", folder), str(error), on_key=True))
    here = {("inputs", n): folder for n, folder in inputs.items() if not hub.is_address(folder)}
    return found + _in_the_way(recipe, here | {("outputs", f): f for f in recipe.outputs})


def _in_the_way(recipe: Recipe, places: Mapping[tuple[str, str], str]) -> list[Problem]:
    """Outputs that are, hold or lie in an input or another output."""
    found = []
    whole = {key: Path(folder).expanduser().resolve() for key, folder in places.items()}
    for (one, path), (other, second) in combinations(whole.items(), 2):
        if other[0] == "outputs" and (path in (second, *second.parents) or second in path.parents):
            named = f"{'input' if one[0] == 'inputs' else 'output'} {one[1]}"
            message = f"is, holds or lies in the {named}; choose another folder"
            found.append(problem(recipe.source, other, message, on_key=True))
    return found

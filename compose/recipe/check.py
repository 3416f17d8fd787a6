"""Whether a recipe can run: all that can be said before any module is read."""

from compose.recipe.folders import folder_faults
from compose.recipe.problems import Problem, problem, refuse
from compose.recipe.step_faults import SPACE, step_faults
from compose.recipe.value import SPACES, Recipe, needed
from compose.syntax import NAME
from lora_jax.errors import nearest


def check(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Refuses a recipe that cannot run, with all that is wrong in it and in the folders it names.

    An output that exists is wrong unless it may be overwritten.
    """
    refuse([*faults(recipe), *folder_faults(recipe, overwrite)], recipe.source)


def faults(recipe: Recipe) -> list[Problem]:
    """What is wrong with a recipe itself, whatever its folders hold."""
    steps = [p for name, step in recipe.steps.items() for p in step_faults(recipe, name, step)]
    return _whole(recipe) + _names(recipe) + steps + _outputs(recipe)


def _whole(recipe: Recipe) -> list[Problem]:
    found = []
    if recipe.space not in SPACES:
        found.append(problem(recipe.source, ("space",), SPACE.format(recipe.space)))
    if not recipe.outputs:
        found.append(problem(recipe.source, (), "has no outputs; say outputs: {FOLDER: STEP}"))
    return found


def _names(recipe: Recipe) -> list[Problem]:
    """Names that expressions cannot use, or that stand for two things."""
    keys = [("inputs", name) for name in recipe.inputs] + [("steps", name) for name in recipe.steps]
    rule = "a name is letters, digits, _ and ., no digit first"
    odd = [(key, rule) for key in keys if not NAME.fullmatch(key[1])]
    twice = "an input has this name; choose another"
    odd += [(("steps", name), twice) for name in recipe.steps if name in recipe.inputs]
    return [problem(recipe.source, key, message, on_key=True) for key, message in odd]


def _outputs(recipe: Recipe) -> list[Problem]:
    """Outputs that name no step."""
    found = []
    for folder, name in recipe.outputs.items():
        if name not in recipe.steps:
            kind = "an input, not a step" if name in recipe.inputs else "unknown step"
            message = f"{name!r}: {kind}; {nearest(name, recipe.steps)}"
            found.append(problem(recipe.source, ("outputs", folder), message))
    return found


def notes(recipe: Recipe) -> list[str]:
    """What is in a recipe to no effect, in words."""
    named = [("step", name) for name in recipe.steps] + [("input", name) for name in recipe.inputs]
    wanted, found = needed(recipe), []
    for kind, name in named:
        if name not in wanted:
            place = recipe.source.keys.get((f"{kind}s", name))
            line = f" (line {place[0]})" if place else ""
            found.append(f"no output needs the {kind} {name}{line}; it is left out")
    return found

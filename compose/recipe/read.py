"""A recipe from its YAML file; what its steps may be is `compose.recipe.methods`' affair."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compose.recipe.check import faults
from compose.recipe.methods import METHODS, options
from compose.recipe.problems import Key, Problem, Source, problem, refuse
from compose.recipe.value import FISHERS, Expression, Method, Recipe, Step
from compose.recipe.yaml_text import parse
from lora_jax.errors import InputError, nearest

KEYS = ("base", "space", "inputs", "steps", "outputs")
COMMON = ("weights", "space", "rank")  # what a step may say beside its method and its options
EXPRESSION = "expression"  # what stands in a method's place


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file; all that is wrong with its text is told at once.

    Folders are not looked at: `check` does that.
    """
    recipe, problems = parsed(Path(path).expanduser())
    refuse(problems, recipe.source)
    return recipe


def parsed(path: Path) -> tuple[Recipe, list[Problem]]:
    """The recipe in a file as far as it can be read, and all that is wrong with its text."""
    return parsed_text(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a recipe's file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def parsed_text(text: str, file: str) -> tuple[Recipe, list[Problem]]:
    """The same of a recipe's text."""
    value, source, problems = parse(text, file)
    form = _Form(source, problems)
    recipe = _recipe(value, form)
    spoiled = {p.key[:2] for p in problems}
    return recipe, problems + [p for p in faults(recipe) if p.key[:2] not in spoiled]


@dataclass(frozen=True)
class _Form:
    """Reads plain values as what they should be, and notes those that are something else."""

    source: Source
    problems: list[Problem]

    def wrong(self, key: Key, message: str, *, on_key: bool = False) -> None:
        """Notes what is wrong at a key."""
        self.problems.append(problem(self.source, key, message, on_key=on_key))

    def table(self, value: Any, key: Key, wanted: str) -> dict[str, Any]:
        """A table; an empty one for anything else."""
        if value is not None and not isinstance(value, dict):
            self.wrong(key, f"{wanted}; got {_told(value)}")
        return value if isinstance(value, dict) else {}

    def text(self, value: Any, key: Key, wanted: str) -> str:
        """A text; an empty one for anything else."""
        if not isinstance(value, str) or not value.strip():
            quote = "; put quotes around it" if isinstance(value, int | float) else ""
            self.wrong(key, f"{wanted}; got {_told(value)}{quote}")
        return value.strip() if isinstance(value, str) else ""


def _recipe(value: Any, form: _Form) -> Recipe:
    top = form.table(value, (), f"a recipe is a table of {', '.join(KEYS)}")
    for name in top:
        if name not in KEYS:
            form.wrong((name,), f"unknown key; {nearest(name, KEYS)}", on_key=True)
    inputs = form.table(top.get("inputs"), ("inputs",), "a table of NAME: FOLDER is wanted")
    steps = form.table(top.get("steps"), ("steps",), "a table of NAME: STEP is wanted")
    outputs = form.table(top.get("outputs"), ("outputs",), "a table of FOLDER: STEP is wanted")
    folder = "a folder or hf://USER/REPO is wanted"
    return Recipe(
        {name: form.text(v, ("inputs", name), folder) for name, v in inputs.items()},
        {name: _step(v, ("steps", name), form) for name, v in steps.items()},
        {n: form.text(v, ("outputs", n), "a step's name is wanted") for n, v in outputs.items()},
        form.text(top["base"], ("base",), "a base model is wanted") if "base" in top else None,
        top.get("space", "delta"),
        form.source,
    )


def _step(value: Any, key: Key, form: _Form) -> Step:
    """A step: a text, or a table with one method in it."""
    if not isinstance(value, dict):
        return Expression(form.text(value, key, "an expression is wanted, or a method's table"))
    method = _method(value, key, form)
    rank, space = value.get("rank"), value.get("space")
    if not method:
        return Expression("")  # what is wrong with it is told
    if method == EXPRESSION:
        for name in value.keys() - {EXPRESSION, "space", "rank"}:
            form.wrong((*key, name), "an expression takes space and rank only", on_key=True)
        text = form.text(value[EXPRESSION], (*key, EXPRESSION), "a text is wanted")
        return Expression(text, space, rank)
    members = _names(value[method], (*key, method), form)
    weights = _weights(value["weights"], (*key, "weights"), form) if "weights" in value else None
    rest = {name: _frozen(v) for name, v in value.items() if name not in (method, *COMMON)}
    if FISHERS in rest:
        rest[FISHERS] = _names(value[FISHERS], (*key, FISHERS), form)
    return Method(method, members, weights, space, rank, rest)


def _names(value: Any, key: Key, form: _Form) -> tuple[str, ...]:
    """Names of inputs or steps: a list of them, or one."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        form.wrong(key, f"a list of names is wanted; got {_told(names)}")
        return ()
    return tuple(names)


def _method(table: Mapping[str, Any], key: Key, form: _Form) -> str:
    """The one key of a step's table that names a method, or "" where that cannot be said."""
    known = [EXPRESSION, *METHODS]
    found = [name for name in table if name in known]
    if len(found) > 1:  # a method's option may be called like another method
        own = {option for name in found if name in METHODS for option in options(name, table)}
        found = [name for name in found if name not in own]
    if len(found) == 1:
        return found[0]
    if found:
        form.wrong(key, f"names {' and '.join(found)}; give each a step of its own", on_key=True)
        return ""
    odd = [name for name in table if name not in COMMON]
    name = next((n for n in odd if isinstance(table[n], list | str)), odd[0] if odd else "")
    what = f"unknown method {name!r}" if name else "names no method"
    form.wrong((*key, name) if name else key, f"{what}; {nearest(name, known)}", on_key=True)
    return ""


def _weights(value: Any, key: Key, form: _Form) -> tuple[Any, ...]:
    """A step's weights, one a member; of what form each may be, `check` says."""
    if not isinstance(value, list):
        form.wrong(key, f"a list of weights is wanted, one a member; got {_told(value)}")
        return ()
    return _frozen(value)


def _frozen(value: Any) -> Any:
    """A value whose lists are tuples."""
    match value:
        case list():
            return tuple(map(_frozen, value))
        case dict():
            return {key: _frozen(item) for key, item in value.items()}
    return value


def _told(value: Any) -> str:
    """A value as a message shows it."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a table"
        case list():
            return "a list"
    return repr(value)


def with_inputs(recipe: Recipe, given: Mapping[str, str]) -> Recipe:
    """The recipe with other folders for some of its inputs."""
    for name in given:
        if name not in recipe.inputs:
            raise InputError(
                f"{recipe.source.file} has no input {name!r}; {nearest(name, recipe.inputs)}"
            )
    return replace(recipe, inputs={**recipe.inputs, **given})

"""What a recipe's step may apply: the methods of merging, and the functions of expressions.

Their options are the parameters of the functions themselves.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, get_args

from compose.functions import FUNCTIONS
from compose.merging.elementwise import ELEMENTWISE
from compose.merging.methods import METHODS as MERGING
from compose.merging.methods import draws, options_of

_PLAIN = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}
_SEED = Parameter("seed", Parameter.KEYWORD_ONLY, default=0, annotation=int)


@dataclass(frozen=True)
class Form:
    """How many modules, or libraries of them, a method takes, and whether they have weights."""

    least: int
    most: int | None  # None: any number
    weighted: bool


def _plain(annotation: Any) -> list[type]:
    """What an option may be, of what a recipe can write."""
    return [kind for kind in get_args(annotation) or (annotation,) if kind in _PLAIN]


def _form(name: str, function: Callable[..., Any]) -> Form:
    """The form of a function of expressions, whose modules come before its options."""
    parameters = signature(function).parameters.values()
    modules = [p for p in parameters if not _plain(p.annotation) and p.name != "space"]
    if any(p.kind is Parameter.VAR_POSITIONAL for p in modules):
        return Form(1, None, name == "mean")
    return Form(len(modules), len(modules), False)


def options(name: str, given: Mapping[str, Any]) -> dict[str, Parameter]:
    """The options of a method; the `given` ones decide where one of them names another method."""
    if name in FUNCTIONS:
        return {
            n: p for n, p in signature(FUNCTIONS[name]).parameters.items() if _plain(p.annotation)
        }
    inner = given.get("inner")
    inner = inner if isinstance(inner, str) and inner in ELEMENTWISE else None
    return options_of(name, inner) | ({"seed": _SEED} if draws(name, inner) else {})


METHODS: dict[str, Form] = {name: Form(1, None, True) for name in MERGING}
METHODS = {name: _form(name, function) for name, function in FUNCTIONS.items()} | {
    name: form for name, form in METHODS.items() if name not in FUNCTIONS
}


def misfit(option: Parameter, value: Any) -> str:
    """What an option should be, if a value is not that; "" if it is."""
    kinds = _plain(option.annotation)
    empty = value is None and type(None) in get_args(option.annotation)
    learned = hasattr(value, "dtype") and (float in kinds or int in kinds)
    if empty or learned or any(_fits(kind, value) for kind in kinds):
        return ""
    return " or ".join(_PLAIN[kind] for kind in kinds)


def _fits(kind: type, value: Any) -> bool:
    """Whether a value is of a kind; whole numbers are numbers, and true is none."""
    if isinstance(value, bool) or kind in (bool, str):
        return type(value) is kind
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, int)

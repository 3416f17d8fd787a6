"""What the options of methods and routers may be: one table for files, expressions and calls."""

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.errors import InputError

ROOT = "sqrt(d)"  # the temperature that is the root of a projection's input width

CHOICES = {
    "majority": ("total", "frequency"),
    "mixing": ("outputs", "factors"),
    "inputs": ("raw", "unit", "centred", "standard"),
    "prototypes": ("own", "shared"),
    "weighting": ("softmax", "uniform"),
    "score": ("paper", "code"),
}
_ABOVE_0, _FROM_0, _FROM_1 = (">", 0), (">=", 0), (">=", 1)
_TO_1 = ("<=", 1)
LIMITS = {
    "density": (_ABOVE_0, _TO_1),
    "gamma": (_FROM_0, _TO_1),
    "epsilon": (_FROM_0, _TO_1),
    "beta": (_FROM_0, _TO_1),
    "common": (_FROM_0, _TO_1),
    "alpha": (_ABOVE_0,),
    "damping": (_FROM_0,),
    "rate": (_FROM_0,),
    "tolerance": (_FROM_0,),
    "temperature": (_ABOVE_0,),
    "keep": (_FROM_1,),
    "shared_rank": (_FROM_1,),
    "iterations": (_FROM_1,),
    "steps": (_FROM_1,),
    "top_k": (_FROM_1,),
    "rank": (_FROM_1,),
    "seed": (_FROM_0,),
}
STATIC = ("keep", "shared_rank", "common")  # what shapes depend on
_RELATIONS = {
    ">": (operator.gt, "above"),
    ">=": (operator.ge, "at least"),
    "<=": (operator.le, "at most"),
}


def fault(name: str, value: Any) -> str:
    """What is wrong with an option's value, or "": of arrays nothing is known.

    Numbers are finite; what is in no table may be any number, or any word.
    """
    if isinstance(value, str):
        return _word_fault(name, value)
    if isinstance(value, jax.Array) and name in STATIC:
        return f"{name} decides what is compiled: give a plain number, not an array"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if not math.isfinite(value):
        return f"{name} must be finite; got {value}"
    limits = LIMITS.get(name, ())
    if all(_RELATIONS[sign][0](value, limit) for sign, limit in limits):
        return ""
    wanted = " and ".join(f"{_RELATIONS[sign][1]} {limit}" for sign, limit in limits)
    return f"{name} must be {wanted}; got {value:g}"


def _word_fault(name: str, value: str) -> str:
    if name in CHOICES and value not in CHOICES[name]:
        return f"unknown {name} {value!r}; choose {' or '.join(CHOICES[name])}"
    if name == "temperature" and value != ROOT:
        return f"temperature must be a number or {ROOT}; got {value!r}"
    return ""


def faults(options: Mapping[str, Any]) -> list[str]:
    """All that is wrong with options' values, by `fault`."""
    return [told for name, value in options.items() if (told := fault(name, value))]


def refuse_faults(**options: Any) -> None:
    """Raises one `InputError` that tells all of it."""
    if wrong := faults(options):
        raise InputError("; ".join(wrong))

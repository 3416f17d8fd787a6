"""Sweeps: a recipe with numbers left open, such as "a - {x}*b", for every value of them.

Every setting is a column like any other, so all of them are measured together, in one compiled
program over the stacked modules.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from lora_jax.errors import InputError, refuse_all

Sweep = Mapping[str, tuple[float, ...]]
Setting = Mapping[str, float]

_OPEN = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")
MOST = 1000  # columns that one recipe may become


def read_sweep(texts: Sequence[str]) -> Sweep:
    """The values of each open number, from "x=0,0.3,1" or "x=0:1:11" (from, to, how many)."""
    found: dict[str, tuple[float, ...]] = {}
    problems = []
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name.isidentifier() or name in found:
            problems.append(f"{text!r} is not NAME=VALUES of a new name")
            continue
        try:
            found[name] = _values(values)
        except ValueError:
            problems.append(f"{text!r}: write {name}=0,0.5,1 or {name}=0:1:11 (from:to:how many)")
    refuse_all(problems, "--sweep")
    return found


def _values(text: str) -> tuple[float, ...]:
    """The numbers of a list or a range; a ValueError if it is neither."""
    if text.count(":") == 2:
        first, last, count = text.split(":")
        if not 2 <= int(count) <= MOST:
            raise ValueError(f"{count} values")
        numbers = np.linspace(float(first), float(last), int(count)).round(12).tolist()
    else:
        numbers = [float(part) for part in text.split(",")]
    if not np.isfinite(numbers).all() or len(set(numbers)) < len(numbers):
        raise ValueError("not finite, or twice the same")
    return tuple(numbers)


def open_numbers(text: str) -> list[str]:
    """The names of the numbers that a text leaves open, each once."""
    return list(dict.fromkeys(_OPEN.findall(text)))


def settings(text: str, sweep: Sweep) -> list[Setting]:
    """Every combination of values of the numbers that a text leaves open."""
    names = open_numbers(text)
    if lost := [name for name in names if name not in sweep]:
        raise InputError(
            f"no values for {', '.join(lost)} in {text!r}; give --sweep {lost[0]}=0:1:11"
        )
    combinations = list(product(*(sweep[name] for name in names)))
    if len(combinations) > MOST:
        raise InputError(f"{text!r} would become {len(combinations)} columns; sweep over fewer")
    return [dict(zip(names, values, strict=True)) for values in combinations]


def filled(text: str, setting: Setting) -> str:
    """The text with its open numbers written in."""
    return _OPEN.sub(lambda found: f"{setting[found[1]]:.12g}", text)


def told(setting: Setting) -> str:
    """A setting in words: "x=0.3 y=1"."""
    return " ".join(f"{name}={value:.12g}" for name, value in setting.items())


def refuse_unused(texts: Sequence[str], sweep: Sweep) -> None:
    """Refuses a sweep over a number that no recipe leaves open."""
    used = {name for text in texts for name in open_numbers(text)}
    if idle := [name for name in sweep if name not in used]:
        raise InputError(f"--sweep {idle[0]}: no --compare has {{{idle[0]}}} in it")

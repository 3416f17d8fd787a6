"""Regular expressions that come from a file: matched in bounded time and memory."""

import math
import re
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import regex

from lora_jax.errors import InputError

SECONDS = 5.0  # that the patterns of one file may take together, over all names
LENGTH = 5000  # of a pattern, in characters
REPEATS = 10_000  # product of its counts {n}: the matcher writes counted repetitions out


@dataclass
class Patience:
    """The seconds that are left for one file's patterns."""

    left: float = field(default_factory=lambda: SECONDS)
    where: str = ""  # the file, for what is told of its patterns


def matching(
    pattern: str, names: Iterable[str], patience: Patience | None = None
) -> dict[str, regex.Match]:
    """The names that a pattern matches whole, as `re.fullmatch` would, with their matches."""
    patience, found = patience or Patience(), {}
    began = time.monotonic()
    told = f"{patience.where}: pattern" if patience.where else "pattern"
    compiled = _compiled(pattern, told)
    for name in names:
        try:
            if (left := patience.left - (time.monotonic() - began)) <= 0:
                raise TimeoutError
            if match := compiled.fullmatch(name, timeout=left):
                found[name] = match
        except TimeoutError:
            raise InputError(
                f"{told} {pattern[:60]!r} takes too long to match {name} (a file's patterns have "
                f"{SECONDS:g} s); name the modules in a list instead"
            ) from None
    patience.left -= time.monotonic() - began
    return found


def _compiled(pattern: str, told: str) -> regex.Pattern:
    """The pattern, compiled by a matcher that keeps to a time limit, if `re` knows it too.

    `told` is what errors call it.
    """
    if "{" in _COUNT.sub("", pattern):  # the matcher would take {e<=1} for "with an error"
        raise InputError(f"{told} {pattern[:60]!r} has a brace that begins no count such as {{2}}")
    counts = [max(map(int, re.findall(r"\d+", c))) for c in _COUNT.findall(pattern)]
    if len(pattern) > LENGTH or math.prod(max(count, 1) for count in counts) > REPEATS:
        raise InputError(f"{told} {pattern[:60]!r} is too large; name the modules in a list")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"{told} {pattern[:60]!r} is no regular expression ({error})") from None


_COUNT = re.compile(r"\{(?:\d+,?\d*|,\d+)\}", re.ASCII)

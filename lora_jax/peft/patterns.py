"""Regular expressions that come from a file: matched in bounded time and memory."""

import math
import re
import time
import warnings
from collections.abc import Iterable

import regex

from lora_jax.errors import InputError

SECONDS = 1.0  # that one pattern may take over all names
LENGTH = 5000  # of a pattern, in characters
REPEATS = 10_000  # product of its counts {n}: the matcher writes counted repetitions out


def matching(pattern: str, names: Iterable[str]) -> dict[str, regex.Match]:
    """The names that a pattern matches whole, as `re.fullmatch` would, with their matches."""
    compiled, deadline, found = _compiled(pattern), time.monotonic() + SECONDS, {}
    for name in names:
        try:
            left = max(deadline - time.monotonic(), 1e-3)
            if match := compiled.fullmatch(name, timeout=left):
                found[name] = match
        except TimeoutError:
            raise InputError(
                f"pattern {pattern!r} takes over {SECONDS:g} s to match {name}; "
                f"name the modules in a list instead"
            ) from None
    return found


def _compiled(pattern: str) -> regex.Pattern:
    """The pattern, compiled by a matcher that keeps to a time limit, if `re` knows it too."""
    counts = [max(map(int, re.findall(r"\d+", c)), default=1) for c in _COUNT.findall(pattern)]
    if len(pattern) > LENGTH or math.prod(max(count, 1) for count in counts) > REPEATS:
        raise InputError(f"pattern {pattern[:60]!r} is too large; name the modules in a list")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise InputError(f"pattern {pattern[:60]!r} is no regular expression ({error})") from None


_COUNT = re.compile(r"\{(\d*,?\d*)\}", re.ASCII)

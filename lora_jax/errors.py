"""The one error a user should see: what was given cannot be used, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something a user gave (a file, a flag, a name, a row) cannot be used.

    Its message names the value, the place and the remedy. The commands print it on one line and
    leave with status 2; every other exception is a bug and keeps its traceback.
    """


def refuse_all(problems: list[str], where: str) -> None:
    """Raises one `InputError` that tells every problem found at `where`; returns if none was."""
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise InputError(f"{where}: " + "; ".join(shown))


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that is none of the `known` ones: the nearest of them, or all."""
    known = list(known)
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}"

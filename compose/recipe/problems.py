"""What is wrong with a recipe, and where: the places of its file, by key."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from compose.syntax import ExpressionError
from lora_jax.errors import InputError

Key = tuple[str | int, ...]  # what a place of a recipe is called: ("steps", "both", "density")
Place = tuple[int, int]  # a line and a column of its file, from 1


@dataclass(frozen=True)
class Source:
    """The file of a recipe, and where in it every key and every value stands."""

    file: str
    text: str
    keys: Mapping[Key, Place] = field(default_factory=dict)
    values: Mapping[Key, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a recipe, and where."""

    key: Key
    message: str
    place: Place | None = None


def problem(source: Source, key: Key, message: str, *, on_key: bool = False) -> Problem:
    """A problem of the value at a key, or of the key itself."""
    both = (source.keys, source.values) if on_key else (source.values, source.keys)
    return Problem(key, message, both[0].get(key) or both[1].get(key))


def refuse(problems: Iterable[Problem], source: Source) -> None:
    """Raises one `InputError` that tells every problem, in the order of the file."""
    told = [_told(p) for p in sorted(problems, key=lambda p: p.place or (0, 0))]
    if len(told) == 1:
        raise InputError(f"{source.file}: {told[0]}")
    if told:
        raise InputError("\n  ".join([f"{source.file}: {len(told)} things are wrong:", *told]))


def _told(problem: Problem) -> str:
    where = f"line {problem.place[0]}, column {problem.place[1]}: " if problem.place else ""
    name = ".".join(map(str, problem.key))
    return f"{where}{name}: {problem.message}" if name else where + problem.message


def in_expression(source: Source, key: Key, text: str, error: ExpressionError) -> Problem:
    """A problem of an expression, at its very character where the file has it on one line."""
    inner = (*key, "expression")
    line, column = source.values.get(inner) or source.values.get(key) or (0, 0)
    row = source.text.split("\n")[line - 1] if line else ""
    start = row.find(text, column - 1) if line else -1
    if start < 0:
        return problem(source, key, f"{error.reason} (column {error.place + 1} of the expression)")
    return Problem(key, error.reason, (line, start + error.place + 1))

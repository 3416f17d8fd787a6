"""The rows of a task: from JSONL files under a data root, or from the Hugging Face hub."""

import random
from collections.abc import Iterator
from pathlib import Path

from eval.tasks import Corpus, Form, Hub, Task
from lora_jax.errors import InputError
from lora_jax.rows import Row, load_split, read_jsonl, read_lines

_REMEDY = "pass --data-root DIR to read local files"


def load_rows(
    task: Task, form: Form, root: Path | None = None, *, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """The rows of a task that `form` can put, or a random `limit` of them in their order.

    They come from `root`, or from the hub if there is none. Each row has what the form needs.
    """
    rows = list(_from_hub(task.hub) if root is None and task.hub else _from_file(task, root))
    if task.open_ended:
        rows = [row for row in rows if row.fields.get(task.label) is not None]
    if not rows:
        raise InputError(f"{source(task, root)} holds no rows for task {task.name!r}")
    if limit is not None and limit < len(rows):
        rows = [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    for row in rows:
        _check(row, {*form.needs(), task.label})
    return rows


def load_text(corpus: Corpus, root: Path | None = None) -> str:
    """The text of a corpus, as one string."""
    if root is None and corpus.hub:
        rows = list(_from_hub(corpus.hub))
        for row in rows:
            _check(row, {"text"})
        return "".join(row.fields["text"] for row in rows)
    return read_text(_path(corpus, root))


def read_text(path: Path) -> str:
    """A text file's contents; an empty one is refused."""
    try:
        text = "".join(read_lines(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; it should hold the text to measure") from None
    if not text.strip():
        raise InputError(f"{path} is empty; there is no text to measure")
    return text


def source(task: Task | Corpus, root: Path | None) -> str:
    """Where a task's rows come from, in words."""
    return f"hub dataset {task.hub.path}" if root is None and task.hub else str(_path(task, root))


def _path(task: Task | Corpus, root: Path | None) -> Path:
    return (root or Path()) / task.file


def _from_file(task: Task, root: Path | None) -> Iterator[Row]:
    path = _path(task, root)
    if not path.is_file():
        raise InputError(f"{path} does not exist; task {task.name!r} reads its rows from there")
    return read_jsonl(path)


def _check(row: Row, needed: set[str]) -> None:
    """Refuses a row that lacks a field that is needed."""
    missing = sorted(needed - {key for key, value in row.fields.items() if value is not None})
    if missing:
        has = ", ".join(row.fields) or "nothing"
        raise InputError(f"{row.place} lacks {', '.join(map(repr, missing))}; it has {has}")


def _from_hub(hub: Hub) -> Iterator[Row]:
    for config in hub.configs:
        data = load_split(hub.path, config, split=hub.split, told=repr(hub.path), remedy=_REMEDY)
        for number, fields in enumerate(data):
            place = f"{hub.path} {config} {hub.split} row {number}"
            yield _ours(hub, Row({**fields, "config": config}, place))


def _ours(hub: Hub, row: Row) -> Row:
    """A hub row made one of ours; one whose fields have changed on the hub is refused."""
    try:
        return Row(hub.row(row.fields), row.place)
    except KeyError as error:
        problem = f"lacks {error}"
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        problem = f"has a field that cannot be used ({error})"
    raise InputError(f"{row.place} {problem}; it has {', '.join(row.fields)}; {_REMEDY}")

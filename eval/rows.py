"""The rows of a task: from JSONL files under a data root, or from the Hugging Face hub."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from eval.tasks import Classification, Corpus, Form, Hub, Measured, Task
from lora_jax.errors import InputError
from lora_jax.hub import is_address, local
from lora_jax.rows import Row, load_split, read_jsonl, read_lines

Root = str | Path | None  # a folder, here or on the hub
_REMEDY = "pass --data-root DIR to read local files"


def load_rows(
    task: Task, form: Form, root: Root = None, *, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """The rows of a task that `form` can put, or a random `limit` of them in their order.

    They come from `root`, or from the hub if there is none. Each row has what the form needs.
    """
    rows = draw_rows(task, root, limit=limit, seed=seed)
    needed = {task.label: "label", **form.needs()}
    for row in rows:
        _refuse_lacking(row, needed, task)
    return rows


def draw_rows(
    task: Task | Classification, root: Root = None, *, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """The rows of a task as they come; see `load_rows`."""
    rows = list(_from_hub(task.hub) if root is None and task.hub else _from_file(task, root))
    if isinstance(task, Task) and task.open_ended:
        rows = [row for row in rows if row.fields.get(task.label) is not None]
    if not rows:
        raise InputError(f"{source(task, root)} holds no rows for task {task.name!r}")
    if limit is not None and limit < len(rows):
        rows = [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return rows


def load_text(corpus: Corpus, root: Root = None) -> str:
    """The text of a corpus, as one string."""
    if root is None and corpus.hub:
        rows = list(_from_hub(corpus.hub))
        for row in rows:
            _refuse_lacking(row, {"text": "text"}, corpus)
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


def source(task: Measured, root: Root) -> str:
    """Where a task's rows come from, in words."""
    return f"hub dataset {task.hub.path}" if root is None and task.hub else str(_path(task, root))


def _path(task: Measured, root: Root) -> Path:
    """A task's file, under the root unless it says itself where it is; fetched if need be."""
    if root is None or is_address(task.file) or Path(task.file).is_absolute():
        return local(task.file)
    return local(root, (task.file,)) / task.file


def _from_file(task: Task | Classification, root: Root) -> Iterator[Row]:
    path = _path(task, root)
    if not path.is_file():
        raise InputError(f"{path} does not exist; task {task.name!r} reads its rows from there")
    return read_jsonl(path)


def _refuse_lacking(row: Row, needed: Mapping[str, str], task: Task | Corpus) -> None:
    """Refuses a row that lacks a field, with the key of the task that needs it."""
    missing = sorted(name for name in needed if row.fields.get(name) is None)
    if not missing:
        return
    has = ", ".join(row.fields) or "nothing"
    told = f"{row.place} lacks {', '.join(map(repr, missing))}; it has {has}"
    if isinstance(task, Task):
        keys = ", ".join(dict.fromkeys(needed[name] for name in missing))
        places = ", ".join(f"{{{name}}}" for name in (*row.fields, "choice"))
        told += f"; {keys} of {task.where} wants it; the placeholders are {places}"
    raise InputError(told)


def _from_hub(hub: Hub) -> Iterator[Row]:
    """The rows of every config of a hub data set, made ours."""
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

"""The rows of a task: from JSONL files under a data root, or from the Hugging Face hub."""

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks import Corpus, Form, Hub, Task
from lora_jax.errors import InputError
from lora_jax.progress import bar


@dataclass(frozen=True)
class Row:
    """A row's fields, and where it stands, for errors and results."""

    fields: dict[str, Any]
    where: str


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
        return "".join(row.fields["text"] for row in _from_hub(corpus.hub))
    return read_text(_path(corpus, root))


def read_text(path: Path) -> str:
    """A text file's contents; an empty one is refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; it should hold the text to measure") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None
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
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield Row(_parse(line, where), where)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold a JSON object; it holds {value!r}")
    return value


def _check(row: Row, needed: set[str]) -> None:
    missing = sorted(needed - {key for key, value in row.fields.items() if value is not None})
    if missing:
        has = ", ".join(row.fields) or "nothing"
        raise InputError(f"{row.where} lacks {', '.join(map(repr, missing))}; it has {has}")


def _from_hub(hub: Hub) -> Iterator[Row]:
    for config in hub.configs:
        for number, fields in enumerate(_hub_split(hub, config)):
            where = f"{hub.path} {config} {hub.split} row {number}"
            yield Row(hub.row({**fields, "config": config}), where)


def _hub_split(hub: Hub, config: str) -> Any:
    """One split of a hub dataset; whatever goes wrong on the way is one clear error."""
    from datasets import load_dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        with bar("fetching") as progress:
            progress.add_task(f"{hub.path} {config}", total=None, note="")
            return load_dataset(hub.path, config, split=hub.split)
    except Exception as error:  # a dozen unrelated types, from three libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"could not fetch {hub.path!r} from the Hugging Face hub ({reason}); "
            f"pass --data-root DIR to read local files"
        ) from None

"""Rows of data from JSONL and text files or the hub, each knowing where it came from."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError


@dataclass(frozen=True)
class Row:
    """One row of a data set, and its place for error messages."""

    fields: dict[str, Any]
    place: str  # "tasks.jsonl line 12"


def read_rows(sources: Iterable[str]) -> list[Row]:
    """Every row of the JSONL files and hub data sets, in order."""
    rows = [row for source in sources for row in _read(source)]
    if not rows:
        raise InputError(f"no rows in {', '.join(sources)}; the data set is empty")
    return rows


def _read(source: str) -> Iterator[Row]:
    if source.startswith("hub:"):
        yield from _from_hub(source)
        return
    path = _existing(source)
    if path.suffix == ".txt":
        raise InputError(f"{path} is plain text; use --objective language-model or next-tokens")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(_lines(file, path), 1):
            if line.strip():
                yield Row(_object(line, f"{path} line {number}"), f"{path} line {number}")


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a .jsonl or .txt file, or hub:NAME")
    return path


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row must be a JSON object; got {type(value).__name__}")
    return value


def _from_hub(source: str) -> Iterator[Row]:
    """Rows of hub:NAME[:SPLIT], through `datasets`."""
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"could not load {source} from the hub: {reason}") from None
    for number, fields in enumerate(data):
        yield Row(dict(fields), f"{source} row {number}")


def read_texts(sources: Iterable[str]) -> list[str]:
    """Plain texts: the paragraphs of .txt files (a line each), or the `text` field of rows."""
    texts: list[str] = []
    for source in sources:
        if Path(source).suffix == ".txt":
            path = _existing(source)
            with path.open(encoding="utf-8-sig") as file:
                texts += [line.strip() for line in _lines(file, path) if line.strip()]
        else:
            texts += [_text(row) for row in _read(source)]
    if not texts:
        raise InputError(f"no text in {', '.join(sources)}; the data set is empty")
    return texts


def _text(row: Row) -> str:
    text = row.fields.get("text")
    if not isinstance(text, str):
        raise InputError(f'{row.place}: plain text needs a "text" field; it has {_names(row)}')
    return text


def _names(row: Row) -> str:
    return ", ".join(row.fields) or "no fields"

"""Rows of data from JSONL and text files, here or on the hub, each knowing where it came from."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_jax.errors import InputError
from lora_jax.hub import local
from lora_jax.rows import Row, load_split, read_jsonl, read_lines


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
    path = existing(source)
    if path.suffix == ".txt":
        raise InputError(f"{path} is plain text; use --objective language-model or next-tokens")
    yield from read_jsonl(path)


def existing(source: str) -> Path:
    """The data file that a path or an address on the hub names."""
    path = local(source)
    if not path.is_file():
        raise InputError(
            f"{path} is not a file; give a .jsonl or .txt file, hf://datasets/USER/REPO/FILE or "
            f"hub:NAME"
        )
    return path


def _from_hub(source: str) -> Iterator[Row]:
    """Rows of hub:NAME[:SPLIT], through `datasets`."""
    name, _, split = source.removeprefix("hub:").partition(":")
    remedy = "check the name, or give a .jsonl file"
    data = load_split(name, split=split or "train", told=source, remedy=remedy)
    for number, fields in enumerate(data):
        yield Row(dict(fields), f"{source} row {number}")


def read_texts(sources: Iterable[str]) -> list[str]:
    """Plain texts: the paragraphs of .txt files (a line each), or the `text` field of rows."""
    texts: list[str] = []
    for source in sources:
        if source.startswith("hub:"):
            texts += map(_text, _from_hub(source))
        elif (path := existing(source)).suffix == ".txt":
            texts += [line.strip() for line in read_lines(path) if line.strip()]
        else:
            texts += map(_text, read_jsonl(path))
    if not texts:
        raise InputError(f"no text in {', '.join(sources)}; the data set is empty")
    return texts


def _text(row: Row) -> str:
    """The row's `text` field; a row without one is refused."""
    text = row.fields.get("text")
    if not isinstance(text, str):
        raise InputError(f'{row.place}: plain text needs a "text" field; it has {_names(row)}')
    return text


def _names(row: Row) -> str:
    return ", ".join(row.fields) or "no fields"

"""Rows of data from JSONL files or the Hugging Face hub, each knowing where it came from."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError
from lora_jax.progress import bar


@dataclass(frozen=True)
class Row:
    """One row of a data set, and its place for errors and results."""

    fields: dict[str, Any]
    place: str  # "tasks.jsonl line 12"


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file; a byte order mark is no part of them."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, one a line; empty lines are passed over."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            place = f"{path} line {number}"
            yield Row(_object(line, place), place)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} must hold a JSON object; it holds a {type(value).__name__}")
    return value


def load_split(name: str, *config: str, split: str, told: str, remedy: str) -> Any:
    """One split of a hub data set; whatever goes wrong on the way is one error.

    The error calls the data set `told` and ends with the `remedy`.
    """
    from datasets import load_dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        with bar("fetching") as progress:
            progress.add_task(" ".join((name, *config)), total=None, note="")
            return load_dataset(name, *config, split=split)
    except Exception as error:  # a dozen unrelated types, from three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"could not load {told} from the hub ({reason}); {remedy}") from None

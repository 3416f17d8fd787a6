"""Labelled texts: what a classifier reads of a row, and which of its labels the row has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_jax.errors import InputError
from lora_jax.rows import Row
from lora_jax.tokens import Tokenizer


@dataclass(frozen=True)
class Form:
    """How a row is read: templates over its fields for one text or a pair, and the label's field.

    Without templates a row has the field "text", or the fields "sentence1" and "sentence2".
    """

    text: str = ""
    second: str = ""
    label: str = "label"


@dataclass(frozen=True)
class Labelled:
    """One text, or a pair of them, with its label's number."""

    texts: tuple[str, ...]
    label: int
    place: str


def read(row: Row, form: Form, labels: Sequence[str]) -> Labelled:
    """The texts and the label of a row; the label is one of `labels`, or its number."""
    if form.text:
        templates = [form.text, form.second] if form.second else [form.text]
        texts = tuple(_filled(template, row) for template in templates)
    else:
        names = ("text",) if "text" in row.fields else ("sentence1", "sentence2")
        texts = tuple(_field(row, name) for name in names)
    return Labelled(texts, _label(row, form.label, labels), row.place)


def _filled(template: str, row: Row) -> str:
    """A template with the row's fields put in."""
    try:
        return template.format_map({k: v for k, v in row.fields.items() if v is not None})
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{row.place}: the template {template!r} does not fit ({error}); the row has "
            f"{', '.join(row.fields) or 'no fields'}"
        ) from None


def _field(row: Row, name: str) -> str:
    text = row.fields.get(name)
    if not isinstance(text, str):
        raise InputError(
            f"{row.place}: a row to classify needs {{text}}, {{sentence1, sentence2}} or templates "
            f"(prompt, second) over its fields; it has {', '.join(row.fields) or 'no fields'}"
        )
    return text


def _label(row: Row, field: str, labels: Sequence[str]) -> int:
    label: Any = row.fields.get(field)
    if isinstance(label, str) and label in labels:
        return list(labels).index(label)
    if isinstance(label, int) and 0 <= label < len(labels):
        return int(label)
    raise InputError(
        f"{row.place}: {field!r} must be one of {', '.join(labels)} or its number from 0; got "
        f"{label!r}"
    )


def encode_texts(
    tokenizer: Tokenizer, rows: Sequence[Labelled], length: int
) -> tuple[list[list[int]], list[bool]]:
    """Each row's token ids, with the special tokens of a text or of a pair, and whether it was cut.

    A row of more than `length` tokens loses the end of its text, of a pair's longer one first.
    """
    if len({len(row.texts) for row in rows}) > 1:
        odd = next(row for row in rows if len(row.texts) != len(rows[0].texts))
        raise InputError(f"{odd.place}: some rows have one text and some a pair; make all alike")

    def encode(rows: Sequence[Labelled], **options: Any) -> list[list[int]]:
        sides = [list(side) for side in zip(*(row.texts for row in rows), strict=True)]
        return tokenizer(*sides, verbose=False, **options)["input_ids"] if rows else []

    ids = encode(rows)
    long = [n for n, tokens in enumerate(ids) if len(tokens) > length]
    short = encode([rows[n] for n in long], truncation="longest_first", max_length=length)
    for n, tokens in zip(long, short, strict=True):
        ids[n] = tokens
    cut = set(long)
    return ids, [n in cut for n in range(len(ids))]

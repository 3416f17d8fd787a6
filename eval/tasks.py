"""Tasks as data: where the rows of a benchmark are, and how a row becomes a question."""

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_jax import labelled
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import read_json
from lora_jax.hub import is_address


@dataclass(frozen=True)
class Form:
    """How a row is put to the model; templates are filled with the row's fields.

    `{choice}` is the answer in question, `{before}` and `{after}` the question around its "_".
    """

    prompt: str
    answer: str = " {choice}"  # what is scored
    choices: str | tuple[str, ...] = "choices"  # the field that holds them, or the words themselves

    def needs(self) -> dict[str, str]:
        """The fields that a row must have, each with the key of the task that names it."""
        named = dict.fromkeys(names_in(self.answer), "answer")
        named |= dict.fromkeys(names_in(self.prompt), "prompt")
        parts = [named[name] for name in ("before", "after") if name in named]
        named |= {"question": parts[0]} if parts else {}
        named |= {self.choices: "choices"} if isinstance(self.choices, str) else {}
        return {n: key for n, key in named.items() if n not in ("choice", "before", "after")}


@dataclass(frozen=True)
class Hub:
    """Rows on the Hugging Face hub: which, and how one becomes a row of ours."""

    path: str
    configs: tuple[str, ...] = ("default",)
    split: str = "validation"
    row: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


@dataclass(frozen=True)
class Task:
    """A multiple-choice benchmark."""

    name: str
    file: str  # JSONL under the data root
    plain: Form
    chat: Form
    hub: Hub | None = None
    label: str = "label"  # the field of the right choice: its index, or its words
    group: str | None = None  # the field whose values are also scored apart
    open_ended: bool = False  # rows without a label are free-form, and left out
    language: str = "en"
    where: str = "the task"  # the JSON file that describes it, if one does

    def form(self, style: str) -> Form:
        """How the task is put in the format called `style`, "plain" or "chat"."""
        return self.chat if style == "chat" else self.plain


@dataclass(frozen=True)
class Corpus:
    """A text whose perplexity is measured."""

    name: str
    file: str
    hub: Hub | None = None
    language: str = "en"


_TEXT = labelled.Form()


@dataclass(frozen=True)
class Classification:
    """Labelled texts, for a classifier."""

    name: str
    file: str  # JSONL under the data root
    labels: tuple[str, ...] = ()  # by number; as the base has them if there is none
    form: labelled.Form = _TEXT
    hub: Hub | None = None
    group: str | None = None  # the field whose values are also scored apart


Measured = Task | Classification | Corpus


def names_in(template: str) -> Iterator[str]:
    """The fields that a template names."""
    return (name for _, name, _, _ in string.Formatter().parse(template) if name is not None)


def find(name: str) -> Measured:
    """The built-in task of this name."""
    from eval.catalogue import TASKS

    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; choose from {', '.join(TASKS)}, or --task-file")
    return TASKS[name]


_KEYS = ("name", "rows", "prompt", "answer", "choices", "label", "group", "language")


def read_any(path: Path) -> Task | Classification:
    """The task that a JSON file describes, of whichever kind it says it is."""
    raw = read_json(path)
    return _classification(raw, path) if raw.get("kind") == "classification" else read_task(path)


def read_task(path: Path) -> Task:
    """The task that a JSON file describes, with `rows` found beside it.

    Its keys are `rows` (a JSONL file, or its hf:// address), `prompt`, `choices` (a field, or a
    list of words), and optionally `name`, `answer`, `label`, `group` and `language`, as in `Form`
    and `Task`.
    """
    raw = read_json(path)
    refuse_all(_problems(raw), str(path))
    choices = raw["choices"] if isinstance(raw["choices"], str) else tuple(raw["choices"])
    plain = Form(raw["prompt"], raw.get("answer", " {choice}"), choices)
    chat = Form(plain.prompt, plain.answer.lstrip(), choices)
    kept = {f.name for f in fields(Task)} & {"label", "group", "language"} & raw.keys()
    return Task(
        name=raw.get("name", path.stem),
        file=_beside(path, raw["rows"]),
        plain=plain,
        chat=chat,
        where=str(path),
        **{key: raw[key] for key in kept},
    )


def _problems(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with a task file, if anything is."""
    found = [f"{key} is missing" for key in ("rows", "prompt", "choices") if key not in raw]
    found += [f"unknown key {key!r} (known: {', '.join(_KEYS)})" for key in raw.keys() - set(_KEYS)]
    for key in (raw.keys() & set(_KEYS)) - {"choices"}:
        if not isinstance(raw[key], str):
            found.append(f"{key} must be a string; it is {raw[key]!r}")
        elif key in ("prompt", "answer"):
            try:
                list(names_in(raw[key]))
            except ValueError as error:
                found.append(f"{key} is not a template ({error}); write {{{{ for a brace")
    words = raw.get("choices", "")
    if not isinstance(words, str) and not (
        isinstance(words, list) and len(words) > 1 and all(isinstance(w, str) for w in words)
    ):
        found.append(f"choices must name a field or list at least two words; it is {words!r}")
    return found


def _beside(path: Path, rows: str) -> str:
    """The rows that a task file names: at an address on the hub, or beside the file."""
    return rows if is_address(rows) else str((path.parent / rows).resolve())


def _classification(raw: Mapping[str, Any], path: Path) -> Classification:
    """The classification task of a JSON file.

    Its keys are `kind` and `rows`, and optionally `labels` (their names, by number), `prompt` and
    `second` (templates of the one text or of the pair), `label` (its field), `name` and `group`.
    """
    known = ("kind", "rows", "labels", "prompt", "second", "label", "name", "group")
    problems = [] if "rows" in raw else ["rows is missing"]
    problems += [f"unknown key {k!r} (known: {', '.join(known)})" for k in raw.keys() - set(known)]
    problems += [
        f"{key} must be a string; it is {raw[key]!r}"
        for key in (*known[:2], *known[3:])
        if not isinstance(raw.get(key, ""), str)
    ]
    labels = raw.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        problems.append(f"labels must be a list of names; it is {labels!r}")
    refuse_all(problems, str(path))
    return Classification(
        name=raw.get("name", path.stem),
        file=_beside(path, raw["rows"]),
        labels=tuple(labels),
        form=labelled.Form(raw.get("prompt", ""), raw.get("second", ""), raw.get("label", "label")),
        group=raw.get("group"),
    )

"""Rows as questions: the prompt and the answer of every choice, in the format asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.tasks import Form, Task, names_in
from lora_jax.errors import InputError
from lora_jax.rows import Row
from lora_jax.tokens import Tokenizer, chat

Frame = Callable[[str], tuple[str, str]]  # content to what precedes the answer and what follows


@dataclass(frozen=True)
class Question:
    """A row as the model reads it; one prompt and one answer a choice."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    lengths: tuple[int, ...]  # of the choices' words, in characters
    label: int
    group: str
    where: str


def frame(style: str, tokenizer: Tokenizer) -> Frame:
    """How the format called `style` surrounds a prompt's content.

    "plain" leaves it alone; "chat" makes it the user's turn of the base's chat template, and the
    answer the reply, with the end of its turn (GenKnowSub's protocol).
    """
    if style == "plain":
        return lambda content: (content, "")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "(reply)"}]
    end = chat(tokenizer, turns).rpartition("(reply)")[2]

    def turn(content: str) -> tuple[str, str]:
        """A prompt's chat up to the reply, and what closes the reply."""
        return chat(tokenizer, [{"role": "user", "content": content}], open_reply=True), end

    return turn


def pose(task: Task, form: Form, row: Row, surround: Frame) -> Question:
    """The question that a row is."""
    choices = _choices(form, row)
    filled = [_fill(form, row, choice) for choice in choices]
    framed = {prompt: surround(prompt) for prompt, _ in filled}
    return Question(
        prompts=tuple(framed[prompt][0] for prompt, _ in filled),
        answers=tuple(answer + framed[prompt][1] for prompt, answer in filled),
        lengths=tuple(map(len, choices)),
        label=_label(row, task.label, choices),
        group=str(row.fields.get(task.group, "")) if task.group else "",
        where=row.place,
    )


def _choices(form: Form, row: Row) -> list[str]:
    """The words of the choices: the form's own, or those in the row's field."""
    if not isinstance(form.choices, str):
        return list(form.choices)
    words = row.fields[form.choices]
    if not isinstance(words, list) or len(words) < 2 or not all(map(_filled, words)):
        raise InputError(
            f"{row.place}: {form.choices!r} must list at least two texts; got {words!r}"
        )
    return words


def _filled(word: Any) -> bool:
    return isinstance(word, str) and word != ""


def _fill(form: Form, row: Row, choice: str) -> tuple[str, str]:
    """The prompt and answer of one choice, from the form's templates."""
    before, _, after = str(row.fields.get("question", "")).partition("_")
    known = {**row.fields, "choice": choice, "before": before, "after": after}
    return _filled_in(form.prompt, known, row.place), _filled_in(form.answer, known, row.place)


def _filled_in(template: str, known: dict[str, Any], place: str) -> str:
    """A template with the fields that it names; one that does not fit is refused."""
    try:
        return template.format_map(known)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        fields = ", ".join(f"{name} {known.get(name)!r}" for name in names_in(template))
        raise InputError(
            f"{place}: the template {template!r} does not fit its {fields} ({error}); "
            f"name fields as {{field}} alone"
        ) from None


def _label(row: Row, field: str, choices: list[str]) -> int:
    """The index of the right choice, given as an index or in words."""
    label = row.fields[field]
    if isinstance(label, str) and label in choices:
        return choices.index(label)
    if isinstance(label, int) and 0 <= label < len(choices):
        return int(label)
    raise InputError(
        f"{row.place}: {field!r} must be one of {choices} or its index from 0; got {label!r}"
    )

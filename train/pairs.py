"""Rows to text: a prompt, and the completion that follows it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from lora_jax.errors import InputError
from lora_jax.tokens import Tokenizer, chat
from train.config import Config
from train.rows import Row


def pair(row: Row, config: Config, tokenizer: Tokenizer) -> tuple[str, str]:
    """A row's prompt and completion as text, from whichever of the three forms it has."""
    fields = row.fields
    if config.prompt:
        prompt, completion = (_fill(t, row) for t in (config.prompt, config.completion))
    elif isinstance(fields.get("messages"), list):
        return _conversation(fields["messages"], row, tokenizer)
    elif {"prompt", "completion"} <= fields.keys():
        prompt, completion = (_text(row, name) for name in ("prompt", "completion"))
    else:
        raise InputError(
            f"{row.place}: a row needs {{prompt, completion}} or {{messages}}, or pass the "
            f"templates --prompt and --completion; it has {', '.join(fields) or 'no fields'}"
        )
    if config.chat:
        turns = [{"role": "user", "content": prompt}]
        return _replied(turns, completion.strip(), row, tokenizer)
    return prompt, completion + (tokenizer.eos_token or "")


def _text(row: Row, name: str) -> str:
    """A field of a row as text; a number is written out, anything else is refused."""
    value = row.fields[name]
    if not isinstance(value, str | int | float):
        raise InputError(f"{row.place}: {name} must be text; got {value!r}")
    return str(value)


def _fill(template: str, row: Row) -> str:
    """A template with the row's fields put in; {answer} is the choice that `label` names."""
    fields = _Fields({name: v for name, v in row.fields.items() if v is not None})
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise InputError(
            f"{row.place}: the template needs a field {error}; the row has {', '.join(fields)}"
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{row.place}: the template {template!r} does not fit: {error}") from None


class _Fields(dict):
    """A row's fields for a template, with `answer` as the choice that `label` names."""

    def __missing__(self, key: str) -> Any:
        if key != "answer" or not {"choices", "label"} <= self.keys():
            raise KeyError(key)
        choices, label = self["choices"], self["label"]
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise ValueError(f"label {label!r} is not one of the {len(choices)} choices, from 0")
        return choices[label]


def _conversation(messages: list[Any], row: Row, tokenizer: Tokenizer) -> tuple[str, str]:
    """All but the last message as the prompt; the last, the assistant's, as the completion."""
    if not messages or not all(map(_is_message, messages)) or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{row.place}: messages must be {{role, content}} objects of text that end with the "
            f"assistant's"
        )
    return _replied(messages[:-1], messages[-1]["content"], row, tokenizer)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(part), str) for part in ("role", "content")
    )


def _replied(turns: list[Any], reply: str, row: Row, tokenizer: Tokenizer) -> tuple[str, str]:
    """Turns and a reply in the chat template, cut where the reply begins."""
    try:
        prompt = chat(tokenizer, turns, open_reply=True)
        whole = chat(tokenizer, [*turns, {"role": "assistant", "content": reply}])
    except TemplateError as error:
        raise InputError(f"{row.place}: the base's chat template refuses it: {error}") from None
    if not whole.startswith(prompt):
        raise InputError(
            f"{row.place}: the base's chat template rewrites earlier turns, so it is unclear where "
            f"the reply begins"
        )
    return prompt, whole[len(prompt) :]

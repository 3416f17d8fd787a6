"""Rows to examples: token ids, and which of them are learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.errors import InputError
from lora_jax.tokens import Tokenizer, chat, encode
from train.config import Config
from train.rows import Row, read_rows, read_texts


@dataclass(frozen=True)
class Example:
    """A text as tokens, and the mask of those that are learned (never the first)."""

    tokens: np.ndarray  # (T,) int32
    learned: np.ndarray  # (T,) bool
    place: str


def load_examples(config: Config, sources: tuple[str, ...], tokenizer: Tokenizer) -> list[Example]:
    """The examples of a run's data, cut to its longest length."""
    if config.objective == "task":
        examples = _tasks(read_rows(sources), config, tokenizer)
    else:
        examples = _segments(read_texts(sources), config, tokenizer, ", ".join(sources))
    kept = [e for e in examples if e.learned.any()]
    if not kept:
        raise InputError(
            f"{', '.join(sources)}: nothing is left to learn; every completion lies beyond "
            f"--length {config.length} or the text is shorter than one segment"
        )
    return kept


def _tasks(rows: list[Row], config: Config, tokenizer: Tokenizer) -> list[Example]:
    """Prompt and completion of each row; the loss is on the completion, or on everything."""
    pairs = [_pair(row, config, tokenizer) for row in rows]
    texts = tokenizer(
        [prompt + completion for prompt, completion in pairs],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    bos = _bos(tokenizer, pairs[0][0])
    examples = []
    for row, (prompt, _), ids, spans in zip(
        rows, pairs, texts["input_ids"], texts["offset_mapping"], strict=True
    ):
        ends = np.asarray([end for _, end in spans], np.int32)
        learned = np.ones(len(ids), bool) if config.loss_on == "all" else ends > len(prompt)
        examples.append(_example(bos + ids, np.r_[[False] * len(bos), learned], config, row.place))
    return examples


def _bos(tokenizer: Tokenizer, text: str) -> list[int]:
    """The beginning-of-text token, if the tokenizer would add one and the text has none."""
    ids = tokenizer("a")["input_ids"]
    adds = bool(ids) and ids[0] == tokenizer.bos_token_id
    return [ids[0]] if adds and not text.startswith(tokenizer.bos_token) else []


def _example(ids: list[int], learned: np.ndarray, config: Config, place: str) -> Example:
    mask = np.array(learned[: config.length], bool)
    mask[:1] = False  # nothing predicts the first token
    return Example(np.asarray(ids[: config.length], np.int32), mask, place)


def _pair(row: Row, config: Config, tokenizer: Tokenizer) -> tuple[str, str]:
    """A row's prompt and completion as text, from whichever of the three forms it has."""
    fields = row.fields
    if config.prompt:
        prompt, completion = (_fill(t, row) for t in (config.prompt, config.completion))
    elif isinstance(fields.get("messages"), list):
        return _conversation(fields["messages"], row, tokenizer)
    elif {"prompt", "completion"} <= fields.keys():
        prompt, completion = str(fields["prompt"]), str(fields["completion"])
    else:
        raise InputError(
            f"{row.place}: a row needs {{prompt, completion}} or {{messages}}, or pass the "
            f"templates --prompt and --completion; it has {', '.join(fields) or 'no fields'}"
        )
    if config.chat:
        turns = [{"role": "user", "content": prompt}]
        return _replied(turns, completion.strip(), tokenizer)
    return prompt, completion + (tokenizer.eos_token or "")


def _fill(template: str, row: Row) -> str:
    """A template with the row's fields put in; {answer} is the choice that `label` names."""
    try:
        return template.format_map(_Fields(row.fields))
    except KeyError as error:
        raise InputError(
            f"{row.place}: the template needs a field {error}; the row has {', '.join(row.fields)}"
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{row.place}: the template {template!r} does not fit: {error}") from None


class _Fields(dict):
    """A row's fields for a template, with `answer` as the choice that `label` names."""

    def __missing__(self, key: str) -> Any:
        if key == "answer" and "choices" in self and "label" in self:
            return self["choices"][self["label"]]
        raise KeyError(key)


def _conversation(messages: list[Any], row: Row, tokenizer: Tokenizer) -> tuple[str, str]:
    """All but the last message as the prompt; the last, the assistant's, as the completion."""
    fine = all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
    if not messages or not fine or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{row.place}: messages must be {{role, content}} objects that end with the assistant's"
        )
    return _replied(messages[:-1], messages[-1]["content"], tokenizer)


def _replied(turns: list[Any], reply: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Turns and a reply in the chat template, cut where the reply begins."""
    prompt = chat(tokenizer, turns, open_reply=True)
    whole = chat(tokenizer, [*turns, {"role": "assistant", "content": reply}])
    if not whole.startswith(prompt):
        raise InputError("this chat template rewrites earlier turns; loss on the reply is unclear")
    return prompt, whole[len(prompt) :]


def _segments(texts: list[str], config: Config, tokenizer: Tokenizer, place: str) -> list[Example]:
    """Plain text in segments of equal length, end to end.

    "next-tokens" is GenKnowSub's objective (section 3): a context, and the loss on the few tokens
    after it. "language-model" learns every token.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = np.asarray([i for ids in encode(tokenizer, texts) for i in (*ids, *end)], np.int32)
    few = config.objective == "next-tokens"
    size = config.context + config.predict if few else min(config.length, len(stream))
    learned = np.arange(size) >= (config.context if few else 1)
    count = len(stream) // max(size, 1)
    return [
        Example(stream[n * size : (n + 1) * size], learned, f"{place} segment {n}")
        for n in range(count)
    ]

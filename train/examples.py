"""Rows to examples: token ids, and which of them are learned."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lora_jax.errors import InputError
from lora_jax.tokens import Tokenizer, encode, opening_tokens
from train.config import Config
from train.pairs import pair
from train.rows import Row, read_rows, read_texts


@dataclass(frozen=True)
class Example:
    """A text as tokens, and the mask of those that are learned (never the first)."""

    tokens: np.ndarray  # (T,) int32
    learned: np.ndarray  # (T,) bool
    place: str
    cut: bool = False  # it was longer than the run's length
    # (S,) int32, what an encoder reads; `tokens` are the decoder's then.
    source: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int32))
    label: int | None = None  # what a classifier says at the learned token, which is the first then


@dataclass(frozen=True)
class Loaded:
    """The examples with something to learn, and how many rows fared otherwise."""

    examples: tuple[Example, ...]
    cut: int = 0  # rows longer than the run's length, which lost their end
    lost: int = 0  # rows with nothing to learn, most because it lay beyond the cut


def load_examples(
    config: Config, sources: tuple[str, ...], tokenizer: Tokenizer, limit: int = 0
) -> Loaded:
    """The examples of some sources, cut to the run's length; at most `limit` if it is given."""
    if config.objective == "task":
        examples = _tasks(drawn(read_rows(sources), config, limit), config, tokenizer)
    else:
        place = ", ".join(sources)
        examples = _segments(read_texts(sources), config, tokenizer, place, limit)
    return learnable(examples, config, sources)


def learnable(examples: list[Example], config: Config, sources: tuple[str, ...]) -> Loaded:
    """Those of the examples that have something to learn; refused if none has."""
    kept = tuple(e for e in examples if e.learned.any())
    if not kept:
        raise InputError(
            f"{', '.join(sources)}: nothing is left to learn; every completion lies beyond "
            f"--length {config.length} or the text is shorter than one segment"
        )
    return Loaded(kept, sum(e.cut for e in examples), len(examples) - len(kept))


def drawn(rows: list[Row], config: Config, limit: int) -> list[Row]:
    """`limit` of the rows, drawn by the seed, in their order; all of them if it is 0."""
    if not limit:
        return rows
    order = np.random.default_rng((config.seed, 1)).permutation(len(rows))
    return [rows[i] for i in sorted(order[:limit])]


def _tasks(rows: list[Row], config: Config, tokenizer: Tokenizer) -> list[Example]:
    """Prompt and completion of each row; the loss is on the completion, or on everything."""
    pairs = [pair(row, config, tokenizer) for row in rows]
    whole = [prompt + completion for prompt, completion in pairs]
    texts = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    bos = opening_tokens(tokenizer)
    examples = []
    for row, (prompt, _), text, ids, spans in zip(
        rows, pairs, whole, texts["input_ids"], texts["offset_mapping"], strict=True
    ):
        start = [] if bos and text.startswith(tokenizer.bos_token) else bos
        ends = np.asarray([end for _, end in spans], np.int32)
        learned = np.ones(len(ids), bool) if config.loss_on == "all" else ends > len(prompt)
        learned = np.r_[np.zeros(len(start), bool), learned]
        examples.append(example(start + ids, learned, config.length, row.place))
    return examples


def example(ids: list[int], learned: np.ndarray, length: int, place: str) -> Example:
    """The tokens and their mask, both cut to `length`."""
    mask = np.array(learned[:length], bool)
    mask[:1] = False  # nothing predicts the first token
    return Example(np.asarray(ids[:length], np.int32), mask, place, cut=len(ids) > length)


def _segments(
    texts: list[str], config: Config, tokenizer: Tokenizer, place: str, limit: int
) -> list[Example]:
    """Plain text in segments, end to end; at most `limit` of them if it is given.

    "next-tokens" is GenKnowSub's objective (section 3): a context, and the loss on the few tokens
    after it (or on all of them, as its released code has it); what is left over at the end is no
    segment. "language-model" learns every token; "entropy" guesses at every token. A segment begins
    as a text does, with the beginning-of-text token if the tokenizer puts one: Gemma reads nothing
    without it.
    """
    few = config.objective == "next-tokens"
    size = config.context + config.predict if few else config.length
    opening = np.asarray(opening_tokens(tokenizer), np.int32)
    room = size - len(opening)
    stream = _stream(texts, tokenizer, limit * room, config.seed)
    first = config.context if few and config.loss_on == "completion" else 1
    learned = np.arange(size) >= first
    starts = range(0, len(stream) - (room - 1 if few else 1), room)
    cuts = [stream[start : start + room] for start in starts][: limit or None]
    pieces = [np.concatenate([opening, cut]) for cut in cuts]
    return [Example(p, learned[: len(p)], f"{place} segment {n}") for n, p in enumerate(pieces)]


def _stream(texts: Sequence[str], tokenizer: Tokenizer, enough: int, seed: int) -> np.ndarray:
    """The token ids of all texts, each closed by the end-of-text token.

    If `enough` is given, only so many are made, from a text that the seed draws, on past the end.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    first = int(np.random.default_rng((seed, 1)).integers(len(texts))) if enough else 0
    order = [*texts[first:], *texts[:first]]
    stream: list[int] = []
    for block in range(0, len(order), 256):
        for ids in encode(tokenizer, order[block : block + 256]):
            stream += (*ids, *end)
        if enough and len(stream) >= enough:
            break
    return np.asarray(stream, np.int32)

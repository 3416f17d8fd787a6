"""Questions in tokens: what all choices share, what is each one's own, and what counts."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eval.prompts import Question
from lora_jax.errors import InputError
from lora_jax.tokens import Tokenizer, encode


@dataclass(frozen=True)
class Span:
    """A stretch of tokens, and which of them count."""

    tokens: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Span":
        return Span(self.tokens[part], self.counted[part])


@dataclass(frozen=True)
class Item:
    """One question in tokens."""

    prefix: Span  # the same for every choice
    rest: tuple[Span, ...]
    divisors: tuple[float, ...]
    # (T,), the choice that has each of the prefix's tokens, from 1; without it, all have them.
    owners: np.ndarray | None = None

    @property
    def shared(self) -> int:
        """How many of the prefix's last tokens reach back to its first that counts."""
        where = np.flatnonzero(self.prefix.counted)
        return len(self.prefix) - int(where[0]) if len(where) else 0


def items(
    questions: Sequence[Question], tokenizer: Tokenizer, *, score: str, style: str, context: int
) -> list[Item]:
    """The questions in tokens, each text tokenised whole.

    `score` says which tokens count and what their nats are divided by: "answer_mean" (PEFT, MTTL),
    "text_mean" (GenKnowSub: the whole text but its first token), "sum", or "char" (the answer over
    its words' characters). A token belongs to the answer if it ends beyond the prompt.
    """
    texts = [p + a for q in questions for p, a in zip(q.prompts, q.answers, strict=True)]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(
        texts, add_special_tokens=style == "plain", return_offsets_mapping=True, verbose=False
    )
    pairs = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    found = []
    for question in questions:
        spans = [
            _span(*next(pairs), len(prompt) if score != "text_mean" else -1)
            for prompt in question.prompts
        ]
        _check(question, spans, context)
        found.append(item(spans, _divisors(question, spans, score)))
    return found


def sourced_items(
    questions: Sequence[Question], tokenizer: Tokenizer, *, score: str, style: str
) -> list[Item]:
    """The questions for an encoder-decoder: prompts to be read, answers to be written, apart.

    Every token of an answer counts, none of a prompt. A prompt has the special tokens of a text.
    """
    prompts = [prompt for q in questions for prompt in dict.fromkeys(q.prompts)]
    answers = [answer for q in questions for answer in q.answers]
    special = {"add_special_tokens": style == "plain", "verbose": False}
    read = iter(tokenizer(prompts, **special)["input_ids"])
    written = iter(encode(tokenizer, answers))
    return [_sourced_item(question, read, written, score) for question in questions]


def _sourced_item(
    question: Question, read: Iterator[list[int]], written: Iterator[list[int]], score: str
) -> Item:
    """A question's next prompts and answers in tokens; a prompt of its own is its choice's."""
    sources = {prompt: next(read) for prompt in dict.fromkeys(question.prompts)}
    if not all(sources.values()):
        raise InputError(f"{question.where}: a prompt is empty; an encoder has nothing to read")
    spans = [_span_of(next(written), True) for _ in question.answers]
    _check(question, spans, sys.maxsize)
    owners, kept = None, [sources[question.prompts[0]]]
    if len(sources) > 1:
        kept = [sources[prompt] for prompt in question.prompts]
        owners = np.repeat(np.arange(len(kept)) + 1, [len(source) for source in kept])
    prefix = _span_of([token for source in kept for token in source], False)
    return Item(prefix, tuple(spans), _divisors(question, spans, score), owners)


def _span_of(tokens: list[int], counted: bool) -> Span:
    return Span(np.array(tokens, np.int32), np.full(len(tokens), counted))


def _span(tokens: list[int], offsets: list[tuple[int, int]], start: int) -> Span:
    """Tokens that end beyond character `start` count, but for the first, which nothing precedes."""
    ends = np.array([end for _, end in offsets], np.int64)
    counted = ends > start
    counted[:1] = False
    return Span(np.array(tokens, np.int32), counted)


def _divisors(question: Question, spans: Sequence[Span], score: str) -> tuple[float, ...]:
    """What each choice's summed nats are divided by."""
    if score == "sum":
        return (1.0,) * len(spans)
    if score == "char":
        return tuple(map(float, question.lengths))
    return tuple(float(span.counted.sum()) for span in spans)


def _check(question: Question, spans: Sequence[Span], context: int) -> None:
    """Refuses a question that is too long, or has a choice without a token to score."""
    longest = max(map(len, spans))
    if longest > context:
        raise InputError(
            f"{question.where} has {longest} tokens and the base model reads {context}; "
            f"shorten the row or leave it out"
        )
    if not all(span.counted.any() for span in spans):
        raise InputError(f"{question.where}: a choice has no token to score; give it some text")


def item(spans: Sequence[Span], divisors: tuple[float, ...]) -> Item:
    """The spans, split where they first differ; every choice keeps a token of its own."""
    first, size = spans[0], min(map(len, spans)) - 1
    alike = np.ones(size, bool)
    for span in spans[1:]:
        alike &= span.tokens[:size] == first.tokens[:size]
        alike &= span.counted[:size] == first.counted[:size]
    split = size if alike.all() else int(np.argmin(alike))
    return Item(first[:split], tuple(span[split:] for span in spans), divisors)

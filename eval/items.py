"""Questions in tokens: what all choices share, what is each one's own, and what counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.prompts import Question
from lora_jax.errors import InputError
from lora_jax.tokens import Tokenizer


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
        found.append(_item(spans, _divisors(question, spans, score)))
    return found


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


def _item(spans: Sequence[Span], divisors: tuple[float, ...]) -> Item:
    """The spans, split where they first differ; every choice keeps a token of its own."""
    first, size = spans[0], min(map(len, spans)) - 1
    alike = np.ones(size, bool)
    for span in spans[1:]:
        alike &= span.tokens[:size] == first.tokens[:size]
        alike &= span.counted[:size] == first.counted[:size]
    split = size if alike.all() else int(np.argmin(alike))
    return Item(first[:split], tuple(span[split:] for span in spans), divisors)

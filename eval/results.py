"""What came out of a run: outcomes by task, the numbers made of them, and results.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import statistics
from eval.prompts import Question
from eval.statistics import Interval
from lora_jax.files import sha256


@dataclass(frozen=True)
class Answers:
    """A multiple-choice task's outcome: the scores of every question's choices, by column."""

    task: str
    source: str
    questions: Sequence[Question]
    scores: Mapping[str, Sequence[np.ndarray]]

    def correct(self, column: str) -> np.ndarray:
        """1 for each question whose right choice has the lowest score, else 0."""
        chosen = [int(np.argmin(scores)) for scores in self.scores[column]]
        return np.array([n == q.label for n, q in zip(chosen, self.questions, strict=True)], float)


@dataclass(frozen=True)
class Perplexity:
    """A text's outcome: the nats of every window, by column, and the tokens they are of."""

    task: str
    source: str
    nats: Mapping[str, np.ndarray]
    counts: np.ndarray


@dataclass(frozen=True)
class Replies:
    """What every column wrote after the prompts."""

    prompts: Sequence[str]
    replies: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Line:
    """One number: of a task, for a column, and its difference from the first column."""

    task: str
    column: str
    metric: str
    examples: int
    value: Interval
    difference: Interval | None


def lines(outcome: Answers | Perplexity, seed: int = 0) -> list[Line]:
    """The outcome's number for every column: accuracy, or nats a token."""
    if isinstance(outcome, Perplexity):
        return _perplexity_lines(outcome, seed)
    correct = {column: outcome.correct(column) for column in outcome.scores}
    first = next(iter(correct.values()))
    return [
        Line(
            outcome.task,
            column,
            "accuracy",
            len(values),
            statistics.mean(values, seed=seed),
            statistics.difference(values, first, seed=seed) if n else None,
        )
        for n, (column, values) in enumerate(correct.items())
    ]


def _perplexity_lines(outcome: Perplexity, seed: int) -> list[Line]:
    counts = outcome.counts
    first = next(iter(outcome.nats.values()))
    return [
        Line(
            outcome.task,
            column,
            "nats_per_token",
            int(counts.sum()),
            statistics.ratio(nats, counts, seed=seed),
            statistics.ratio(nats - first, counts, seed=seed) if n else None,
        )
        for n, (column, nats) in enumerate(outcome.nats.items())
    ]


def by_group(outcome: Answers) -> dict[str, dict[str, float]]:
    """Accuracy by group and column; empty for a task without groups."""
    groups = np.array([question.group for question in outcome.questions])
    correct = {column: outcome.correct(column) for column in outcome.scores}
    return {
        str(group): {name: float(c[groups == group].mean()) for name, c in correct.items()}
        for group in np.unique(groups[groups != ""])
    }


def document(
    outcomes: Sequence[Answers | Perplexity],
    numbers: Sequence[Line],
    replies: Replies | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds: provenance, the numbers, and every example's scores."""
    return {
        "provenance": dict(provenance),
        "numbers": [asdict(line) for line in numbers],
        "tasks": [_details(outcome) | _hash(outcome.source) for outcome in outcomes],
        "replies": asdict(replies) if replies else {},
    }


def _details(outcome: Answers | Perplexity) -> dict[str, Any]:
    """What results.json holds of one outcome."""
    head = {"task": outcome.task, "source": outcome.source}
    if isinstance(outcome, Perplexity):
        total = outcome.counts.sum()
        return head | {
            "perplexity": {c: _exp(n.sum() / total) for c, n in outcome.nats.items()},
            "tokens": outcome.counts.tolist(),
            "nats": {column: values.tolist() for column, values in outcome.nats.items()},
        }
    examples = [
        {
            "where": question.where,
            "group": question.group,
            "label": question.label,
            "scores": {column: scores[n].tolist() for column, scores in outcome.scores.items()},
        }
        for n, question in enumerate(outcome.questions)
    ]
    return head | {"groups": by_group(outcome), "examples": examples}


def _exp(nats: float) -> float | None:
    """e to the power of `nats`, or None (null in JSON) where that is beyond a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def _hash(source: str) -> dict[str, str]:
    return {"sha256": sha256(Path(source))} if Path(source).is_file() else {}

"""Labelled texts measured with a classifier: the nats of each label, the lowest of which wins."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from eval.prompts import Question
from eval.tasks import Classification, Measured
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.labelled import Labelled, read
from lora_jax.lengths import assign, choose_lengths
from lora_jax.modules import Adapter
from lora_jax.rows import Row

Rows = jax.Array | np.ndarray  # on a device, or still on the host


@struct.dataclass
class Texts:
    """Texts in tokens, one a row."""

    tokens: Rows  # (B, T)
    segments: Rows  # (B, T), 1 where there is a token


def label_nll(config: models.Config, weights: Any, adapter: Adapter, texts: Texts) -> jax.Array:
    """The negative log-likelihood (B, labels), in nats, of every label of each text."""
    tokens, segments = jnp.asarray(texts.tokens), jnp.asarray(texts.segments)
    hidden = models.forward(config, weights, adapter, tokens, segments=segments).hidden
    logits = models.classify(config, weights, adapter, hidden, segments)
    return -jax.nn.log_softmax(logits.astype(jnp.float32))


def plan(
    ids: Sequence[Sequence[int]], *, tokens: int, multiple: int = 1
) -> list[tuple[np.ndarray, Texts]]:
    """Texts in batches of about `tokens` tokens, with their indices; see `batches.plan`."""
    sizes = [len(text) for text in ids]
    lengths = assign(sizes, choose_lengths(sizes))
    planned = []
    for length in np.unique(lengths):
        group = np.flatnonzero(lengths == length)
        count = -(-len(group) // max(1, tokens // int(length)))
        rows = -(-len(group) // (count * multiple)) * multiple
        for start in range(0, len(group), rows):
            chosen = group[start : start + rows]
            planned.append((chosen, _texts([ids[n] for n in chosen], rows, int(length))))
    return planned


def _texts(ids: Sequence[Sequence[int]], rows: int, length: int) -> Texts:
    """Texts as arrays; the rows that fill a batch up are padding."""
    tokens, segments = (np.zeros((rows, length), np.int32) for _ in range(2))
    for row, text in enumerate(ids):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    return Texts(tokens, segments)


def labelled(task: Classification, row: Row, names: Sequence[str]) -> tuple[Labelled, Question]:
    """A row as a classifier reads it, and as the question whose choices are the labels."""
    found = read(row, task.form, names)
    group = str(row.fields.get(task.group, "")) if task.group else ""
    prompts, lengths = (found.texts[0],) * len(names), tuple(map(len, names))
    return found, Question(prompts, tuple(names), lengths, found.label, group, row.place)


def common_labels(wanted: Iterable[Measured]) -> tuple[str, ...]:
    """The labels that the classification tasks name, if any does: a base model has one head."""
    named = [task for task in wanted if isinstance(task, Classification) and task.labels]
    for task in named:
        if task.labels != named[0].labels:
            raise InputError(
                f"{named[0].name} and {task.name} have different labels, and a base model has one "
                f"head; measure them in runs of their own"
            )
    return named[0].labels if named else ()


def misfits(kind: str, wanted: Iterable[Measured], *, generate: bool) -> list[str]:
    """What cannot be asked of a base model of this kind, for want of a head or of a vocabulary."""
    apart: dict[bool, list[str]] = {True: [], False: []}
    for task in wanted:
        apart[isinstance(task, Classification)].append(task.name)
    if kind != "classifier":
        return [f"{name!r} has labels; take a classifier, such as RoBERTa" for name in apart[True]]
    writes = ["--generate"] if generate else []
    return [
        f"{name} asks for chances of tokens; take a causal model or an encoder-decoder"
        for name in [*map(repr, apart[False]), *writes]
    ]

"""Examples to batches: a pure function of the seed and the step, in a few fixed shapes."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.lengths import assign, choose_lengths, fixed_length
from train.examples import Example
from train.loss import Batch, Source


@dataclass(frozen=True)
class Shape:
    """What a row has room for."""

    tokens: int
    labels: int
    source: int  # tokens that an encoder reads; 0 where there is none


@dataclass(frozen=True)
class Plan:
    """How a data set is cut into batches: rows (of one or more packed examples) by shape."""

    examples: tuple[Example, ...]
    rows: tuple[tuple[int, ...], ...]  # examples of each row
    shapes: tuple[Shape, ...]
    shaped: np.ndarray  # (rows,), the number of each row's shape
    size: int  # rows a batch: forward rows times accumulation
    slots: int  # places for them: more where a mesh's devices do not divide the rows
    accumulate: int

    @property
    def steps(self) -> int:
        """Optimiser steps in one pass over the data."""
        counts = np.bincount(self.shaped, minlength=len(self.shapes))
        return int(np.sum(-(-counts // self.size)))


def make_plan(
    examples: list[Example], *, batch: int, accumulate: int, pack: int = 0, multiple: int = 1
) -> Plan:
    """A plan of batches of `batch` rows a forward pass, packed to `pack` tokens.

    The arrays have room for a multiple of `multiple` rows, so that a batch has the same rows on
    any mesh.
    """
    sizes = [len(e.tokens) for e in examples]
    rows = _packed(sizes, pack) if pack else [(i,) for i in range(len(examples))]
    shapes, shaped = _shapes([[examples[i] for i in row] for row in rows])
    slots = -(-batch // multiple) * multiple * accumulate
    return Plan(tuple(examples), tuple(rows), shapes, shaped, batch * accumulate, slots, accumulate)


def _shapes(rows: list[list[Example]]) -> tuple[tuple[Shape, ...], np.ndarray]:
    """A few shapes that hold rows of examples, and the number of each row's.

    Rows are told apart by their tokens, or by their sources' where these are more.
    """
    filled = np.asarray([sum(len(e.tokens) for e in row) for row in rows])
    read = np.asarray([sum(len(e.source) for e in row) for row in rows])
    labels = np.asarray([sum(int(e.learned.sum()) for e in row) for row in rows])
    longer = max(filled, read, key=np.sum)
    _, shaped = np.unique(assign(longer, choose_lengths(longer)), return_inverse=True)

    def shape(inside: np.ndarray) -> Shape:
        tokens, source = (fixed_length(side[inside].max()) for side in (filled, read))
        return Shape(tokens, min(-(-int(labels[inside].max()) // 8) * 8, tokens), source)

    return tuple(shape(shaped == n) for n in range(shaped.max() + 1)), shaped


def _packed(sizes: list[int], capacity: int) -> list[tuple[int, ...]]:
    """Examples put together, longest first, each in the fullest row of `capacity` that has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # the tokens left in each row, sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = bisect_left(room, (sizes[index], 0))
        if fits == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(fits)
        rows[row].append(index)
        insort(room, (left - sizes[index], row))
    return [tuple(row) for row in rows]


def epoch_batches(plan: Plan, seed: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of each batch of a pass, shuffled; a batch has rows of one shape."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(plan.rows))
    batches = []
    for number in range(len(plan.shapes)):
        chosen = order[plan.shaped[order] == number]
        batches += [chosen[i : i + plan.size] for i in range(0, len(chosen), plan.size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_from(plan: Plan, seed: int, step: int) -> Iterator[np.ndarray]:
    """The row numbers of every batch from `step` on, without end."""
    epoch, skip = divmod(step, plan.steps)
    while True:
        yield from epoch_batches(plan, seed, epoch)[skip:]
        epoch, skip = epoch + 1, 0


def assemble(plan: Plan, rows: np.ndarray) -> Batch:
    """The arrays of a batch, (accumulate, rows, ...); rows that are missing are left empty."""
    shape = plan.shapes[plan.shaped[rows[0]]]
    size, room = (plan.slots, shape.tokens), (plan.slots, shape.labels)
    tokens, segments, positions = (np.zeros(size, np.int32) for _ in range(3))
    scored, targets = (np.zeros(room, np.int32) for _ in range(2))
    weights = np.zeros(room, np.float32)
    for slot, row in enumerate(rows):
        parts = [plan.examples[i] for i in plan.rows[row]]
        ids = np.concatenate([p.tokens for p in parts])
        tokens[slot, : len(ids)] = ids
        counts = [len(p.tokens) for p in parts]
        segments[slot, : len(ids)] = np.repeat(np.arange(len(parts)) + 1, counts)
        positions[slot, : len(ids)] = np.concatenate([np.arange(n) for n in counts])
        at = np.flatnonzero(np.concatenate([p.learned for p in parts]))
        labels = [p.label for p in parts if p.label is not None]
        where, what = (at, labels) if labels else (at - 1, ids[at])
        scored[slot, : len(at)], targets[slot, : len(at)] = where, what
        weights[slot, : len(at)] = 1
    arrays: Any = (tokens, segments, positions, scored, targets, weights)
    source = _sources(plan, rows, shape.source) if shape.source else None
    fold = (plan.accumulate, plan.slots // plan.accumulate, -1)
    return jax.tree.map(lambda x: x.reshape(fold), Batch(*arrays, source=source))


def _sources(plan: Plan, rows: np.ndarray, length: int) -> Source:
    """What an encoder reads of a batch's rows, which are not packed."""
    read: Any = [np.zeros((plan.slots, length), np.int32) for _ in range(2)]
    for slot, row in enumerate(rows):
        ids = plan.examples[plan.rows[row][0]].source
        read[0][slot, : len(ids)], read[1][slot, : len(ids)] = ids, 1
    return Source(*read)


def count_tokens(batch: Batch) -> int:
    """The tokens of a batch, without padding."""
    sides = [batch.segments] if batch.source is None else [batch.segments, batch.source.segments]
    return sum(int((side > 0).sum()) for side in sides)


def places(plan: Plan, rows: np.ndarray) -> str:
    """Where a batch's first rows came from, for error messages."""
    names = [plan.examples[i].place for row in rows[:3] for i in plan.rows[row]]
    return ", ".join(names[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")

"""Examples to batches: a pure function of the seed and the step, in a few fixed shapes."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.lengths import assign, choose_lengths
from train.examples import Example
from train.loss import Batch


@dataclass(frozen=True)
class Plan:
    """How a data set is cut into batches: rows (of one or more packed examples) by length."""

    examples: tuple[Example, ...]
    rows: tuple[tuple[int, ...], ...]  # examples of each row
    lengths: np.ndarray  # (rows,), the fixed length each row is filled to
    scored: dict[int, int]  # for each length, the labels a row has room for
    size: int  # rows a batch: forward rows times accumulation
    slots: int  # places for them: more where a mesh's devices do not divide the rows
    accumulate: int

    @property
    def steps(self) -> int:
        """Optimiser steps in one pass over the data."""
        return sum(-(-int((self.lengths == n).sum()) // self.size) for n in self.scored)


def make_plan(
    examples: list[Example], *, batch: int, accumulate: int, pack: int = 0, multiple: int = 1
) -> Plan:
    """A plan of batches of `batch` rows a forward pass, packed to `pack` tokens.

    The arrays have room for a multiple of `multiple` rows, so that a batch has the same rows on
    any mesh.
    """
    sizes = [len(e.tokens) for e in examples]
    rows = _packed(sizes, pack) if pack else [(i,) for i in range(len(examples))]
    filled = [sum(sizes[i] for i in row) for row in rows]
    lengths = assign(filled, choose_lengths(filled))
    labels = np.asarray([sum(int(examples[i].learned.sum()) for i in row) for row in rows])
    scored = {int(n): int(-(-labels[lengths == n].max() // 8) * 8) for n in np.unique(lengths)}
    scored = {n: min(k, n) for n, k in scored.items()}
    slots = -(-batch // multiple) * multiple * accumulate
    return Plan(
        tuple(examples), tuple(rows), lengths, scored, batch * accumulate, slots, accumulate
    )


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
    """The row numbers of each batch of a pass, shuffled; a batch has rows of one length."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(plan.rows))
    batches = []
    for length in plan.scored:
        chosen = order[plan.lengths[order] == length]
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
    length = int(plan.lengths[rows[0]])
    shape, room = (plan.slots, length), (plan.slots, plan.scored[length])
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
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
        scored[slot, : len(at)], targets[slot, : len(at)] = at - 1, ids[at]
        weights[slot, : len(at)] = 1
    fold = (plan.accumulate, plan.slots // plan.accumulate, -1)
    arrays: Any = (tokens, segments, positions, scored, targets, weights)
    return Batch(*(x.reshape(fold) for x in arrays))


def places(plan: Plan, rows: np.ndarray) -> str:
    """Where a batch's first rows came from, for error messages."""
    names = [plan.examples[i].place for row in rows[:3] for i in plan.rows[row]]
    return ", ".join(names[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")

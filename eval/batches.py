"""Items in batches of few fixed shapes, so that few programs are compiled and little is padding."""

import math
from collections.abc import Sequence

import numpy as np

from eval.items import Item, Span
from eval.scoring import Batch
from lora_jax.lengths import bucket


def plan(
    items: Sequence[Item], *, tokens: int, program: int, multiple: int = 1
) -> list[tuple[np.ndarray, Batch]]:
    """Batches of about `tokens` tokens, each with the indices of its items.

    `program` is what compiling one more shape costs, in tokens. Rows are a multiple of `multiple`,
    the number of devices; the rows that fill a batch up come last and have no index.
    """
    sizes = np.array([_size(item) for item in items])
    planned = []
    for group in _divide(sizes, np.arange(len(items)), program):
        size = sizes[group].max(axis=0)
        count = math.ceil(len(group) / max(1, tokens // int(_cost(size))))
        rows = math.ceil(len(group) / count / multiple) * multiple
        for start in range(0, len(group), rows):
            chosen = group[start : start + rows]
            planned.append((chosen, _batch([items[n] for n in chosen], rows, size)))
    return planned


def _size(item: Item) -> tuple[int, int, int, int]:
    """The buckets of an item's prefix T, choices K, rest A and shared counted tokens."""
    prefix = bucket(max(len(item.prefix), 8))
    rest = bucket(max(map(len, item.rest)))
    return prefix, bucket(len(item.rest)), rest, min(bucket(item.shared), prefix - 1)


def _cost(sizes: np.ndarray) -> np.ndarray:
    """Tokens that a row of these sizes (..., 4) runs; to unembed one is a quarter of one more."""
    prefix, choices, rest, shared = np.moveaxis(sizes, -1, 0)
    return prefix + choices * rest + (shared + choices * rest) // 4


def _divide(sizes: np.ndarray, members: np.ndarray, program: int) -> list[np.ndarray]:
    """The members in groups of like size, cut as long as a cut saves more than a `program`."""
    whole = len(members) * _cost(sizes[members].max(axis=0))
    cost, left, right = min((_cut(sizes, members, axis) for axis in range(4)), key=lambda c: c[0])
    if whole - cost <= program:
        return [np.sort(members)]
    return _divide(sizes, left, program) + _divide(sizes, right, program)


def _cut(sizes: np.ndarray, members: np.ndarray, axis: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The cheapest cut in two of the members sorted along one axis, and what the two cost."""
    if len(members) < 2:
        return math.inf, members, members
    ordered = members[np.argsort(sizes[members, axis], kind="stable")]
    count, each = len(ordered), sizes[ordered]
    below = np.arange(1, count) * _cost(np.maximum.accumulate(each)[:-1])
    above = np.arange(1, count)[::-1] * _cost(np.maximum.accumulate(each[::-1])[::-1][1:])
    best = int(np.argmin(below + above))
    return float(below[best] + above[best]), ordered[: best + 1], ordered[best + 1 :]


def _batch(items: Sequence[Item], rows: int, size: np.ndarray) -> Batch:
    """Items as arrays; rows and choices that fill up count nothing and are divided by one."""
    time, choices, rest, shared = map(int, size)
    prefix, prefix_counted = _blank(rows, time)
    own, counted = _blank(rows, choices, rest)
    segments, divisor = np.zeros((rows, time), np.int32), np.ones((rows, choices), np.float32)
    for row, item in enumerate(items):
        start = time - len(item.prefix)
        segments[row, start:] = -1 if item.owners is None else item.owners
        _write(prefix[row, start:], prefix_counted[row, start:], item.prefix)
        for choice, span in enumerate(item.rest):
            _write(own[row, choice], counted[row, choice], span)
        divisor[row, : len(item.rest)] = item.divisors
    return Batch(prefix, segments, prefix_counted, own, counted, divisor, shared)


def _blank(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them count."""
    return np.zeros(shape, np.int32), np.zeros(shape, np.float32)


def _write(tokens: np.ndarray, counted: np.ndarray, span: Span) -> None:
    """Puts a span at the start of a row."""
    tokens[: len(span)], counted[: len(span)] = span.tokens, span.counted

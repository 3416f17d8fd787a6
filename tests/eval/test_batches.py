"""Batches are of few shapes, hold every item once, and fit the budget."""

import numpy as np
import pytest

from eval.batches import plan
from eval.items import Item, Span


def item(prefix: int, rest: int, choices: int = 2) -> Item:
    def span(size):
        return Span(np.ones(size, np.int32), np.ones(size, bool))

    empty = Span(np.ones(prefix, np.int32), np.zeros(prefix, bool))
    return Item(empty, tuple(span(rest) for _ in range(choices)), (1.0,) * choices)


@pytest.fixture(scope="module")
def mixed() -> list[Item]:
    draw = np.random.default_rng(0)
    return [
        item(int(p), int(r)) for p, r in zip(*draw.integers(1, (90, 20), (300, 2)).T, strict=True)
    ]


def shapes(planned):
    return {(batch.prefix.shape, batch.rest.shape) for _, batch in planned}


def test_every_item_is_in_one_batch(mixed):
    indices = np.concatenate([indices for indices, _ in plan(mixed, tokens=2000, program=500)])
    assert sorted(indices) == list(range(len(mixed)))


def test_items_lie_right_aligned(mixed):
    for indices, batch in plan(mixed, tokens=2000, program=500):
        for row, n in enumerate(indices):
            length = len(mixed[n].prefix)
            assert length == batch.prefix[row].sum() == -batch.segments[row].sum()
            assert batch.prefix[row, batch.prefix.shape[1] - length :].all()
            assert batch.segments[row, batch.prefix.shape[1] - length :].all()
            assert batch.rest[row].sum() == sum(map(len, mixed[n].rest))


def test_dear_programs_are_few(mixed):
    few, many = (plan(mixed, tokens=2000, program=cost) for cost in (10**9, 200))
    assert len(shapes(few)) == 1 < len(shapes(many)) < 30
    run = [sum(b.prefix.size + b.rest.size for _, b in planned) for planned in (few, many)]
    assert run[1] < 0.7 * run[0]


def test_rows_are_spread_evenly_in_the_multiple(mixed):
    planned = plan(mixed, tokens=2000, program=10**9, multiple=8)
    rows = {len(batch.prefix) for _, batch in planned}
    assert len(rows) == 1 and rows.pop() % 8 == 0


def test_a_row_over_the_budget_stands_alone():
    planned = plan([item(500, 4), item(500, 4)], tokens=100, program=0)
    assert [len(batch.prefix) for _, batch in planned] == [1, 1]

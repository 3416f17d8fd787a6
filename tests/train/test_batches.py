"""Batches are a pure function of seed and step, in few shapes, and packing changes no loss."""

from itertools import islice

import jax
import numpy as np
import pytest

from train.batches import assemble, batches_from, epoch_batches, make_plan, places
from train.examples import Example
from train.loss import batch_loss


@pytest.fixture(scope="module")
def examples():
    """Thirty-seven examples of 3 to 40 tokens, of which the last few are learned."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 41, 37)
    return [
        Example(
            rng.integers(0, 256, size, dtype=np.int32),
            np.arange(size) >= size - rng.integers(1, size),
            f"rows line {n}",
        )
        for n, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module", params=[0, 48], ids=["apart", "packed"])
def plan(examples, request):
    return make_plan(examples, batch=4, accumulate=2, pack=request.param)


def batches(plan, seed, step, count):
    return [rows.tolist() for rows in islice(batches_from(plan, seed, step), count)]


def test_an_epoch_visits_every_example_once(plan, examples):
    for epoch in (0, 1):
        rows = np.concatenate(epoch_batches(plan, 0, epoch))
        visited = [i for row in rows for i in plan.rows[row]]
        assert sorted(visited) == list(range(len(examples)))


def test_batches_depend_on_seed_and_step_alone(plan):
    count = 3 * plan.steps
    whole = batches(plan, 7, 0, count)
    assert all(batches(plan, 7, n, count - n) == whole[n:] for n in range(count))
    assert batches(plan, 8, 0, count) != whole
    assert whole[: plan.steps] != whole[plan.steps : 2 * plan.steps]  # each epoch in its own order


def test_steps_count_the_batches_of_an_epoch(plan):
    assert plan.steps == len(epoch_batches(plan, 3, 5))


def test_a_batch_holds_its_examples_and_nothing_else(plan):
    for rows in epoch_batches(plan, 0, 0):
        batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), assemble(plan, rows))
        wanted = [plan.examples[i] for row in rows for i in plan.rows[row]]
        real = batch.segments > 0
        assert real.sum() == sum(len(e.tokens) for e in wanted)
        np.testing.assert_array_equal(
            batch.tokens[real], np.concatenate([e.tokens for e in wanted])
        )
        np.testing.assert_array_equal(
            batch.targets[batch.weights > 0],
            np.concatenate([e.tokens[e.learned] for e in wanted]),
        )


def test_every_label_follows_the_position_that_is_scored(plan):
    for rows in epoch_batches(plan, 0, 0):
        batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), assemble(plan, rows))
        row, slot = np.nonzero(batch.weights)
        at = batch.scored[row, slot]
        np.testing.assert_array_equal(batch.tokens[row, at + 1], batch.targets[row, slot])
        assert (batch.segments[row, at] == batch.segments[row, at + 1]).all()
        assert (batch.positions[row, at] + 1 == batch.positions[row, at + 1]).all()


def test_batches_come_in_few_shapes(plan):
    every = [rows for epoch in range(3) for rows in epoch_batches(plan, 0, epoch)]
    shapes = {tuple(x.shape for x in jax.tree.leaves(assemble(plan, rows))) for rows in every}
    assert len(shapes) == len(plan.shapes) <= 4


def test_packing_fills_rows_without_overflow(examples):
    plan = make_plan(examples, batch=4, accumulate=1, pack=48)
    filled = [sum(len(examples[i].tokens) for i in row) for row in plan.rows]
    assert max(filled) <= 48
    assert sum(sorted(filled)[:2]) > 48  # no two rows would fit in one


def losses(config, weights, adapter, plan):
    loss = jax.jit(lambda b: batch_loss(config, weights, adapter, b))
    every = [assemble(plan, rows) for rows in epoch_batches(plan, 0, 0)]
    parts = [jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), b) for b in every]
    return sum(float(loss(part)) for part in parts)


def test_packing_changes_no_loss(config, weights, random_lora, examples):
    adapter = random_lora(config)
    apart = losses(config, weights, adapter, make_plan(examples, batch=8, accumulate=1))
    packed = make_plan(examples, batch=8, accumulate=1, pack=48)
    assert len(packed.rows) < len(examples)
    np.testing.assert_allclose(losses(config, weights, adapter, packed), apart, rtol=1e-5)


def test_a_mesh_adds_empty_rows_and_moves_no_example(examples):
    plain = make_plan(examples, batch=6, accumulate=2)
    meshed = make_plan(examples, batch=6, accumulate=2, multiple=4)
    for rows, same in zip(epoch_batches(plain, 0, 0), epoch_batches(meshed, 0, 0), strict=True):
        assert rows.tolist() == same.tolist()
        few, many = assemble(plain, rows), assemble(meshed, rows)
        assert few.tokens.shape[:2] == (2, 6) and many.tokens.shape[:2] == (2, 8)
        assert few.weights.sum() == many.weights.sum()


def test_places_name_the_first_rows_of_a_batch(examples):
    plan = make_plan(examples, batch=8, accumulate=1)
    rows = next(rows for rows in epoch_batches(plan, 0, 0) if len(rows) > 3)
    told = places(plan, rows)
    assert all(plan.examples[i].place in told for row in rows[:3] for i in plan.rows[row])
    assert told.endswith(f"and {len(rows) - 3} more")

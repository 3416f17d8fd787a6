"""A step: parts equal the whole, rates rise and fall, and what is not finite freezes the state."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.modules import init_lora
from train.config import Config
from train.loss import Batch
from train.step import make_optimizer, make_programs, make_schedule


@pytest.fixture(scope="module")
def adapter(config):
    shapes = models.projections(config)
    targets = ("q_proj", "down_proj")
    made = init_lora(jax.random.key(3), shapes, targets=targets, rank=2, alpha=4.0)
    return jax.tree.map(lambda x: x + 0.05, made)  # b is not zero, so that every gradient counts


@pytest.fixture(scope="module")
def batch(random_tokens):
    """A batch (1, 6, ...) whose rows have different numbers of labels."""
    tokens = random_tokens(1, 6, 16)
    scored = jnp.broadcast_to(jnp.arange(8) + 4, (1, 6, 8))
    weights = (jnp.arange(8) <= jnp.arange(6)[:, None]).astype(jnp.float32)[None]
    targets = jnp.take_along_axis(tokens, scored + 1, axis=2)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    return Batch(tokens, jnp.ones_like(tokens), positions, scored, targets, weights)


@pytest.fixture(scope="module")
def programs_of(config):
    """A function from settings to their programs, compiled once for the whole file."""

    @cache
    def make(**settings):
        settings = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"} | settings
        return make_programs(Config(data=("rows.jsonl",), out=Path("out"), **settings), config, 10)

    return make


@pytest.fixture
def take(programs_of, weights, adapter):
    """A function from a batch and settings to the state and metrics after `count` steps."""

    def go(batch, count=1, **settings):
        programs = programs_of(**settings)
        state = programs.start(adapter)
        for _ in range(count):
            state, metrics = programs.train(weights, state, batch)
        return state, metrics

    return go


close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6))


def test_accumulation_equals_one_big_batch(take, batch):
    whole, metrics = take(batch, count=2)
    parts = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[2:]), batch)
    summed, metrics_summed = take(parts, count=2, accumulate=3)
    close(metrics_summed, metrics)
    close(summed.adapter, whole.adapter)


def test_remat_changes_nothing(take, batch):
    close(take(batch, remat=True), take(batch))


def test_a_step_counts_and_moves_the_module(take, batch, adapter):
    state, _ = take(batch, count=3)
    assert int(state.step) == 3 and not state.failed
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.adapter, dict(adapter))
    assert all(jax.tree.leaves(moved))


def test_the_loss_is_the_mean_a_label(programs_of, take, batch, weights, adapter):
    sums = programs_of().validate(weights, adapter, batch)
    np.testing.assert_allclose(take(batch)[1]["loss"], sums["loss"] / sums["labels"], rtol=1e-5)


def test_dropout_is_of_the_step(take, batch):
    settings = {"dropout": 0.5, "learning_rate": 0.0}  # the module stays, the mask does not
    losses = [float(take(batch, count=n, **settings)[1]["loss"]) for n in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_loss_that_is_not_finite_freezes_the_state(programs_of, take, batch, weights):
    programs, (good, _) = programs_of(), take(batch)
    kept = jax.tree.map(np.asarray, good)
    spoiled = weights | {"norm": weights["norm"] * jnp.nan}
    state, metrics = programs.train(spoiled, good, batch)
    assert np.isnan(metrics["loss"]) and state.failed
    state, metrics = programs.train(weights, state, batch)  # the step that was under way
    assert np.isfinite(metrics["loss"]) and state.failed
    assert int(state.step) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.adapter, state.optimizer),
        (kept.adapter, kept.optimizer),
    )


def test_validation_counts_labels_and_leaves_dropout_out(programs_of, weights, adapter, batch):
    settings = ({}, {"dropout": 0.5, "learning_rate": 0.0})
    sums = [programs_of(**s).validate(weights, adapter, batch) for s in settings]
    assert sums[0]["labels"] == 1 + 2 + 3 + 4 + 5 + 6
    close(sums[1], sums[0])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_schedules_rise_then_fall_to_their_ends(config_of, schedule, middle, last):
    rate = make_schedule(config_of(schedule=schedule, warmup=0.2, learning_rate=2.0), 50)
    rise = [float(rate(n)) for n in range(10)]
    np.testing.assert_allclose(rise, np.arange(1, 11) * 0.2, rtol=1e-5)
    np.testing.assert_allclose(
        [rate(10), rate(30), rate(50)], [2, 2 * middle, 2 * last], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.03), (1, 0.99), (3, 0.34), (5, 0.99)])
def test_even_the_shortest_run_moves_at_every_step(config_of, steps, warmup):
    rate = make_schedule(config_of(warmup=warmup, learning_rate=1.0), steps)
    assert all(0 < float(rate(n)) <= 1 for n in range(steps))


def test_clipping_bounds_the_gradient(config_of):
    gradient = {"x": jnp.array([3.0, 4.0])}
    settings = {"optimizer_beta1": 0.0, "optimizer_eps": 1e3, "learning_rate": 1.0, "warmup": 0.0}

    def update(clip):  # with so large an eps AdamW moves in proportion to the gradient
        optimizer = make_optimizer(config_of(clip=clip, **settings), 10)
        return optimizer.update(gradient, optimizer.init(gradient), gradient)[0]["x"]

    np.testing.assert_allclose(update(1.0), update(0.0) / 5, rtol=2e-2)
    np.testing.assert_allclose(update(10.0), update(0.0), rtol=1e-6)

"""The loop keeps the best state, writes every number down, and stops without losing a step."""

import threading
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from lora_jax.errors import InputError
from train.batches import make_plan
from train.examples import Example
from train.loop import Run, fit, validation
from train.record import read_metrics
from train.step import Programs, State


class Kept:
    """Stands for the checkpoints: the states that were saved."""

    def __init__(self):
        self.states = []

    def save(self, state):
        if not self.states or int(self.states[-1].step) != int(state.step):
            self.states.append(state)

    def wait(self):
        pass


def start(step=0):
    adapter = {"x": jnp.asarray(float(step))}
    infinite, number = jnp.asarray(np.inf), jnp.asarray(step)
    return State(number, adapter, None, adapter, infinite, jnp.asarray(False))


def train(losses, stop, stop_at):
    """A step that gives the losses one after the other and counts itself into the module."""

    def go(weights, state, batch):
        step = int(state.step) + 1
        loss = losses.get(step, 1.0)
        if step == stop_at:
            stop.set()
        metrics = {"loss": jnp.asarray(loss), "gradient_norm": jnp.asarray(1.0)}
        if state.failed or not np.isfinite(loss):
            return state.replace(failed=jnp.asarray(True)), metrics
        return state.replace(step=jnp.asarray(step), adapter={"x": jnp.asarray(step)}), metrics

    return go


@pytest.fixture
def run_of(config_of, tmp_path):
    """A function to a run whose step and validation are stand-ins."""

    def make(steps=10, losses=None, validations=None, stop_at=0, **settings):
        tokens = np.arange(6, dtype=np.int32)
        examples = [Example(tokens, tokens > n % 4, f"rows line {n}") for n in range(20)]
        plan = make_plan(examples, batch=4, accumulate=1)
        stop = threading.Event()

        def validate(weights, adapter, batch):
            labels = batch.weights.sum()
            loss = (validations or {}).get(int(adapter["x"]), 1.0)
            return {"loss": loss * labels, "labels": labels}

        return Run(
            config=config_of(**settings),
            programs=Programs(start, train(losses or {}, stop, stop_at), validate, None),
            frozen=None,
            plan=plan,
            held_out=plan if validations else None,
            steps=steps,
            mesh=None,
            metrics=tmp_path / "metrics.jsonl",
            saver=Kept(),
            stop=stop,
        )

    return make


def go(run, state=None):
    progress = Progress(disable=True)
    return fit(run, state or start(), progress, progress.add_task("", note=""))


def test_every_step_is_written_down(run_of):
    run = run_of(losses={n: 10.0 - n for n in range(1, 11)})
    go(run)
    rows = read_metrics(run.metrics)
    assert [(r["step"], r["loss"]) for r in rows] == [(n, 10 - n) for n in range(1, 11)]
    assert all(r["tokens"] == 24 for r in rows)


def test_the_lowest_validation_loss_is_kept(run_of):
    run = run_of(validations={2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 5.0}, evaluate_every=2)
    state = go(run)
    assert int(state.adapter["x"]) == 10
    assert int(state.best["x"]) == 4 and float(state.best_loss) == 1
    held = [r["validation_loss"] for r in read_metrics(run.metrics) if "validation_loss" in r]
    assert held == [3, 1, 2, 1, 5]


def test_the_last_step_is_validated_and_kept(run_of):
    run = run_of(steps=7, validations={7: 0.5}, evaluate_every=3, checkpoint_every=5)
    assert int(go(run).best["x"]) == 7
    assert [int(s.step) for s in run.saver.states] == [5, 7]
    assert float(run.saver.states[-1].best_loss) == 0.5


def test_validation_weighs_every_label_alike(run_of):
    run = run_of(validations={0: 2.0})
    parts = iter([(10.0, 1.0), (0.0, 3.0), *[(0.0, 2.0)] * 3])

    def validate(*_):
        loss, labels = next(parts)
        return {"loss": loss, "labels": labels, "accuracy": labels / 2}

    run = replace(run, programs=replace(run.programs, validate=validate))
    assert validation(run, start().adapter) == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("step", [1, 2, 5, 10])  # with and without one under way behind it
@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_step_and_batch(run_of, step, loss):
    run = run_of(losses={step: loss}, checkpoint_every=5)
    with pytest.raises(InputError, match=rf"step {step} gave loss {loss} .*rows line \d+"):
        go(run)
    kept = run.saver.states[-1]
    assert (int(kept.step), float(kept.adapter["x"])) == (step - 1, step - 1)
    assert not kept.failed  # or a resumed run would stand still
    assert [r["step"] for r in read_metrics(run.metrics)] == list(range(1, step))


def test_a_validation_that_is_not_finite_stops_and_is_not_kept(run_of):
    run = run_of(validations={2: 1.0, 4: np.nan}, evaluate_every=2, checkpoint_every=2)
    with pytest.raises(InputError, match="validation after step 4 gave loss nan"):
        go(run)
    assert [int(s.step) for s in run.saver.states] == [2]


@pytest.mark.parametrize("step", [1, 3, 9])
def test_a_request_to_stop_keeps_the_step_under_way(run_of, step):
    run = run_of(stop_at=step, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}; --resume goes on"):
        go(run)
    assert int(run.saver.states[-1].step) == step
    assert [r["step"] for r in read_metrics(run.metrics)] == list(range(1, step + 1))


def test_a_request_at_the_last_step_lets_the_run_end(run_of):
    assert int(go(run_of(stop_at=10)).step) == 10


def test_a_run_without_checkpoints_says_that_nothing_is_kept(run_of):
    run = replace(run_of(stop_at=3, checkpoint_every=0), saver=None)
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, as --checkpoint-every is 0"):
        go(run)


def test_a_resumed_run_takes_the_batches_that_are_left(run_of):
    seen = []

    def watched(run):
        def step(weights, state, batch):
            seen.append(batch.weights.sum(axis=-1).tolist())
            return run.programs.train(weights, state, batch)

        return replace(run, programs=replace(run.programs, train=step))

    go(watched(run_of()))
    go(watched(run_of()), start(6))
    assert seen[10:] == seen[6:10] and len(seen) == 14

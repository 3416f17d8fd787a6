"""The training loop: dispatch steps, watch them from one step behind, validate, checkpoint."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import Progress, TaskID

from lora_jax.errors import InputError
from lora_jax.mesh import put_batch
from train.batches import Plan, assemble, batches_from, count_tokens, places
from train.checkpoints import Saver
from train.config import Config
from train.record import append_metrics
from train.step import Programs, State


@dataclass(frozen=True)
class Run:
    """Everything a loop works with and does not change."""

    config: Config
    programs: Programs
    frozen: Any  # the base's weights, or whatever the subject makes a pass of
    plan: Plan
    held_out: Plan | None
    steps: int
    mesh: Mesh | None
    metrics: Path
    saver: Saver | None
    stop: threading.Event  # set when the run is asked to stop


@dataclass(frozen=True)
class Flight:
    """A step under way: what is known of it before its numbers are in."""

    step: int
    metrics: dict[str, jax.Array]
    rows: np.ndarray
    tokens: int


def fit(run: Run, state: State, progress: Progress, task: TaskID) -> State:
    """The state after the run's last step; metrics and checkpoints are written on the way.

    A step's numbers are read only when the next is under way, so the device never waits for them.
    A loss that is not finite stops the run, with the state before it kept; a request to stop does
    so after the step under way.
    """
    first = int(state.step)
    batches = batches_from(run.plan, run.config.seed, first)
    flying: Flight | None = None
    since = time.perf_counter()
    for step in range(first, run.steps):
        rows = next(batches)
        batch = assemble(run.plan, rows)
        tokens = count_tokens(batch)
        state, metrics = run.programs.train(run.frozen, state, put_batch(batch, run.mesh, axis=1))
        if flying is not None:
            since = _land(run, flying, since, state, progress, task)
        flying = Flight(step + 1, metrics, rows, tokens)
        stopping = run.stop.is_set() and step + 1 < run.steps
        if stopping or _due(step + 1, run):
            _land(run, flying, since, state, progress, task)
            state, flying, since = _pause(run, state), None, time.perf_counter()
        if stopping:
            _interrupt(run, state)
    return state


def _due(step: int, run: Run) -> bool:
    """Whether the loop stops to validate or to checkpoint after this step."""
    every = run.config.checkpoint_every
    return step == run.steps or _validates(step, run) or bool(every and step % every == 0)


def _validates(step: int, run: Run) -> bool:
    """Whether the loop validates after this step."""
    every = run.config.evaluate_every or -(-run.steps // 10)
    return run.held_out is not None and (step % every == 0 or step == run.steps)


def _pause(run: Run, state: State) -> State:
    """Validates, if it is time; then saves the state."""
    step = int(state.step)
    if _validates(step, run):
        means = validation(run, state.adapter)
        row = {f"validation_{name}": value for name, value in means.items()}
        append_metrics(run.metrics, {"step": step, **row})
        loss = means["loss"]
        if not np.isfinite(loss):
            raise InputError(
                f"the validation after step {step} gave loss {loss}; the checkpoints before it are "
                f"kept; try a lower --learning-rate, with --resume or anew"
            )
        if loss < float(state.best_loss):
            best = jax.tree.map(lambda x: x.copy(), state.adapter)
            placed = jax.device_put(np.asarray(loss, np.float32), state.best_loss.sharding)
            state = replace(state, best=best, best_loss=placed)
    every = run.config.checkpoint_every
    if run.saver is not None and every and (step % every == 0 or step == run.steps):
        run.saver.save(state)
    return state


def validation(run: Run, adapter: Any) -> dict[str, float]:
    """The means a label over the held-out rows: "loss", and of a classifier "accuracy".

    Every batch is under way before one is read.
    """
    assert run.held_out is not None
    sums = [
        run.programs.validate(run.frozen, adapter, put_batch(batch, run.mesh, axis=1))
        for batch in _once(run.held_out)
    ]
    totals = {name: sum(float(part[name]) for part in sums) for name in sums[0]}
    labels = totals.pop("labels")
    return {name: total / labels for name, total in totals.items()}


def _once(plan: Plan) -> Iterator[Any]:
    """The plan's batches, each once, in an order that does not change."""
    batches = batches_from(plan, seed=0, step=0)
    return (assemble(plan, next(batches)) for _ in range(plan.steps))


def _land(
    run: Run, flight: Flight, since: float, state: State, progress: Progress, task: TaskID
) -> float:
    """Reads a step's numbers, records and shows them, and the time when they were in.

    Stops the run if they are not finite.
    """
    values = {name: float(value) for name, value in flight.metrics.items()}
    now = time.perf_counter()
    if not np.isfinite([values["loss"], values["gradient_norm"]]).all():
        _stop(run, flight, state, values)
    speed = flight.tokens / (now - since)
    row = {"step": flight.step, **values, "tokens": flight.tokens, "tokens_per_second": speed}
    append_metrics(run.metrics, row)
    note = f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s"
    progress.update(task, completed=flight.step, note=note)
    return now


def _keep(run: Run, state: State) -> bool:
    """Whether the state is on disk: it is once this returns, if the run keeps checkpoints."""
    if run.saver is not None:
        run.saver.save(state)
        run.saver.wait()
    return run.saver is not None


def _interrupt(run: Run, state: State) -> None:
    """Ends the run as it was asked to, and says whether its state is kept."""
    kept = _keep(run, state)
    fate = "--resume goes on from there" if kept else "nothing is kept, as --checkpoint-every is 0"
    raise KeyboardInterrupt(f"stopped after step {int(state.step)}; {fate}")


def _stop(run: Run, flight: Flight, state: State, values: dict[str, float]) -> None:
    """Ends the run whose step was not finite, and says which rows did it."""
    kept = _keep(run, replace(state, failed=state.failed & False))  # frozen at the last good step
    fate = "the state before it is kept" if kept else "nothing is kept, as --checkpoint-every is 0"
    raise InputError(
        f"step {flight.step} gave loss {values['loss']} and gradient norm "
        f"{values['gradient_norm']}; its batch begins with {places(run.plan, flight.rows)}; "
        f"{fate}; try a lower --learning-rate, with --resume or anew"
    )

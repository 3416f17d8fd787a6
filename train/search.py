"""Mixing weights found without gradients, from the loss alone, as LoRAHub finds them (2307.13269).

LoRAHub leaves the choice of optimiser to a library; so do we, to SciPy's COBYLA, which models the
loss linearly around the best point so far. Every evaluation is a line of metrics.jsonl, and a run
that is resumed reads those it has made instead of making them again.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.progress import Progress, TaskID

from train.batches import Plan
from train.loop import Run, validation
from train.record import append_metrics, read_metrics
from train.step import State
from train.subject import Subject

REACH = 0.5  # of the first steps


def search(run: Run, subject: Subject, state: State, progress: Progress, task: TaskID) -> State:
    """The state with the best weights (M,) of `--mix.search` evaluations of the loss on the data.

    They are judged on the data to learn from; what is held out only shows how they carry over.
    """
    from scipy.optimize import minimize  # its import takes a while

    known = _known(run.metrics)
    found: list[tuple[float, np.ndarray]] = []

    def loss(weights: np.ndarray) -> float:
        """The mean loss a label and the penalty, of weights that may have been tried before."""
        tried = np.asarray(weights, np.float32)
        place = tuple(tried.tolist())
        if place not in known:
            known[place] = _evaluate(run, subject, run.plan, tried)
            row = {"step": len(found) + 1, "weights": list(place), "loss": known[place]}
            append_metrics(run.metrics, row)
        found.append((known[place], tried))
        note = f"loss {min(value for value, _ in found):.4f}"
        progress.update(task, completed=len(found), note=note)
        return known[place]

    limit = subject.bound or np.inf
    first = np.asarray(state.adapter, np.float64)
    options = {"maxiter": run.config.mix.search, "rhobeg": REACH}
    minimize(loss, first, method="COBYLA", bounds=[(-limit, limit)] * len(first), options=options)
    _, best = min(found, key=lambda pair: pair[0])
    return _ended(run, subject, state, best)


def _known(metrics: Path) -> dict[tuple[float, ...], float]:
    """The evaluations that an interrupted run has made."""
    rows = (row for row in read_metrics(metrics) if "weights" in row)
    return {tuple(row["weights"]): row["loss"] for row in rows}


def _evaluate(run: Run, subject: Subject, plan: Plan, weights: np.ndarray) -> float:
    """The mean loss a label of mixing weights on a plan's rows, and their penalty."""
    judged = dataclasses.replace(run, held_out=plan)
    placed = jnp.asarray(weights)
    return validation(judged, placed)["loss"] + float(subject.penalty(placed))


def _ended(run: Run, subject: Subject, state: State, best: np.ndarray) -> State:
    """The state of a search that is over."""
    loss = np.inf
    if run.held_out is not None:
        loss = _evaluate(run, subject, run.held_out, best)
    weights, step = jnp.asarray(best), jnp.asarray(run.steps, jnp.int32)
    return dataclasses.replace(
        state, step=step, adapter=weights, best=weights, best_loss=jnp.float32(loss)
    )

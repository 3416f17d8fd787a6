"""The diagonal of a module's Fisher information, which `compose.merging` weighs entries by.

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2111.09832), equation 3, with
the data's own labels: the empirical Fisher information.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress, TaskID

from lora_jax.errors import InputError
from lora_jax.mesh import put_batch
from lora_jax.modules import Adapter
from train.batches import assemble, epoch_batches, places
from train.loop import Run
from train.record import append_metrics
from train.step import State

Loss = Callable[[Adapter, Any], jax.Array]
AHEAD = 2  # batches under way before the oldest one's loss is read


def diagonal(loss: Loss, adapter: Adapter, examples: Any) -> Adapter:
    """The mean over `examples` of the squared gradient of a loss, in the form of the module.

    `loss` is one example's negative log-likelihood in nats, and `examples` a pytree whose leaves
    have the examples in front; one gradient exists at a time.
    """

    def added(total: Adapter, example: Any) -> tuple[Adapter, None]:
        """The sum of squares with one example's."""
        return jax.tree.map(_plus_square, total, jax.grad(loss)(adapter, example)), None

    total, _ = jax.lax.scan(added, _nothing(adapter), examples)
    count = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda x: x / count, total)


def _nothing(adapter: Adapter) -> Adapter:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), adapter)


def _plus_square(total: jax.Array, gradient: jax.Array) -> jax.Array:
    return total + gradient.astype(total.dtype) ** 2


def estimate(run: Run, state: State, progress: Progress, task: TaskID) -> State:
    """The state with the Fisher information of its module in the module's place.

    It is the mean over all of the run's examples, each one's loss being the sum over its labels.
    A loss that is not finite stops the run.
    """
    placed = jax.tree.map(lambda x: x.sharding, state.adapter)
    total, flying = jax.device_put(_nothing(state.adapter), placed), deque()
    batches = epoch_batches(run.plan, run.config.seed, 0)
    for number, rows in enumerate(batches, start=1):
        batch = put_batch(assemble(run.plan, rows), run.mesh, axis=1)
        total, sums = run.programs.square(run.frozen, state.adapter, total, batch)
        flying.append((number, rows, sums))
        while flying and (len(flying) > AHEAD or number == len(batches)):
            done, *rest = flying.popleft()
            loss = _recorded(run, done, *rest)
            progress.update(task, completed=done, note=f"loss {loss:.3f}")
        if run.stop.is_set():
            raise KeyboardInterrupt(f"stopped after {number} of {len(batches)} batches")
    count = len(run.plan.examples)
    return replace(state, adapter=jax.tree.map(lambda x: x / count, total))


def _recorded(run: Run, number: int, rows: np.ndarray, sums: dict[str, jax.Array]) -> float:
    """A batch's loss a label, once it is in metrics.jsonl; one that is not finite is refused."""
    loss = float(sums["loss"]) / float(sums["labels"])
    if not np.isfinite(loss):
        raise InputError(f"batch {number}, from {places(run.plan, rows)}, gave loss {loss}")
    append_metrics(run.metrics, {"step": number, "loss": loss})
    return loss

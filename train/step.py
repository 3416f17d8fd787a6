"""One optimiser step as a pure function, and the state it carries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from lora_jax import models
from lora_jax.mesh import replicated
from lora_jax.project import Dropout
from train.config import Config
from train.loss import Batch, batch_loss, batch_sums
from train.subject import MODULE, Subject, bounded


@struct.dataclass
class State:
    """Everything that a resumed run needs, besides its config and its data."""

    step: jax.Array  # optimiser steps done
    adapter: Any  # or what else is trained
    optimizer: Any
    best: Any  # the adapter of the lowest validation loss
    best_loss: jax.Array  # nats a label; infinite before the first validation
    failed: jax.Array  # a loss or gradient was not finite; the state is the one before it


@dataclass(frozen=True)
class Programs:
    """A run's compiled programs."""

    start: Callable[[Any], State]
    train: Callable[[Any, State, Batch], tuple[State, dict[str, jax.Array]]]
    validate: Callable[[Any, Any, Batch], dict[str, jax.Array]]
    square: Callable[[Any, Any, Any, Batch], tuple[Any, dict[str, jax.Array]]]


def make_optimizer(
    config: Config, steps: int, bound: float | None = None
) -> optax.GradientTransformation:
    """AdamW behind a global clip, on the run's schedule; its steps end within ±bound."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.optimizer_beta1,
        b2=config.optimizer_beta2,
        eps=config.optimizer_eps,
        weight_decay=config.weight_decay,
    )
    parts = [optax.clip_by_global_norm(config.clip)] * bool(config.clip) + [adamw]
    return optax.chain(*parts, *([] if bound is None else [bounded(bound)]))


def make_schedule(config: Config, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then cosine or linear to zero, or constant."""
    rate, warm = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - warm, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "constant": optax.constant_schedule(rate),
    }[config.schedule]
    # A rate of zero would waste the first step, so the rise begins one step up.
    rise = optax.linear_schedule(rate / max(warm, 1), rate, max(warm - 1, 1))
    return optax.join_schedules([rise, after], [warm]) if warm else after


def make_programs(
    config: Config,
    model: models.Config,
    steps: int,
    mesh: Mesh | None = None,
    subject: Subject = MODULE,
) -> Programs:
    """The programs of a run: start a state, take a step, validate, and add up squared gradients.

    What is `frozen` is the base's weights, or whatever the subject makes a pass of. On a mesh the
    state stays whole on every device, as modules are small.
    """
    optimizer, schedule = make_optimizer(config, steps, subject.bound), make_schedule(config, steps)

    def start(adapter: Any) -> State:
        return first_state(optimizer, adapter)

    def train(frozen: Any, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """The state after a step, and the step's metrics."""
        loss, gradient = loss_and_gradient(config, model, subject, frozen, state, batch)
        norm = optax.tree.norm(gradient)
        rate = jnp.asarray(schedule(state.step))
        failed = state.failed | ~jnp.isfinite(loss) | ~jnp.isfinite(norm)
        metrics = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        return next_state(optimizer, state, gradient, failed), metrics

    def validate(frozen: Any, adapter: Any, batch: Batch) -> dict[str, jax.Array]:
        """The sums over a batch that validation averages."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        entropy = config.objective == "entropy"
        return batch_sums(model, *subject.applied(frozen, adapter), flat, entropy=entropy)

    def square(
        frozen: Any, adapter: Any, total: Any, batch: Batch
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The total with the squares of each row's gradient, and the batch's sums."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)

        def loss(adapter: Any, row: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            """A row's loss, summed over its labels."""
            one = jax.tree.map(lambda x: x[None], row)
            sums = batch_sums(model, *subject.applied(frozen, adapter), one, remat=config.remat)
            return sums["loss"], sums

        gradients, sums = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(adapter, flat)
        total = jax.tree.map(
            lambda t, g: t + jnp.sum(g.astype(t.dtype) ** 2, axis=0), total, gradients
        )
        return total, jax.tree.map(jnp.sum, sums)

    # Said outright, or the compiler cuts the state as it likes and the second step compiles anew.
    placed = None if mesh is None else replicated(mesh)
    step = jax.jit(train, donate_argnums=1, out_shardings=(placed, None))
    squares = jax.jit(square, donate_argnums=2, out_shardings=(placed, None))
    return Programs(jax.jit(start), step, jax.jit(validate), squares)


def first_state(optimizer: optax.GradientTransformation, adapter: Any) -> State:
    """The state of a run that begins with `adapter`, or what else the subject trains."""
    # The optimiser and the best adapter get buffers of their own, since steps donate them.
    best = jax.tree.map(jnp.copy, adapter)
    # Typed outright: a weak type would compile the step anew once a typed loss replaces it.
    infinite, zero = jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
    return State(zero, adapter, optimizer.init(adapter), best, infinite, jnp.asarray(False))


def loss_and_gradient(
    config: Config, model: models.Config, subject: Subject, frozen: Any, state: State, batch: Batch
) -> tuple[jax.Array, Any]:
    """The loss a label and its gradient, summed over the accumulated parts of a batch."""
    labels = jnp.maximum(batch.weights.sum(), 1)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def part_loss(trained: Any, index: jax.Array, part: Batch) -> jax.Array:
        """A part's share of the loss a label; each part draws a dropout of its own."""
        dropout = Dropout(jax.random.fold_in(key, index), config.dropout)
        options = {"dropout": dropout if config.dropout else None, "remat": config.remat}
        options["entropy"] = config.objective == "entropy"
        summed = batch_loss(model, *subject.applied(frozen, trained), part, **options)
        return summed / labels + subject.penalty(trained) / config.accumulate

    def add(total: Any, indexed_part: tuple[Any, Batch]) -> tuple[Any, None]:
        """The total with one part's loss and gradient added, as `scan` carries it."""
        found = jax.value_and_grad(part_loss)(state.adapter, *indexed_part)
        return jax.tree.map(jnp.add, total, found), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.adapter))
    if config.accumulate == 1:
        return add(zero, (0, jax.tree.map(lambda x: x[0], batch)))[0]
    return jax.lax.scan(add, zero, (jnp.arange(config.accumulate), batch))[0]


def next_state(
    optimizer: optax.GradientTransformation, state: State, gradient: Any, failed: jax.Array
) -> State:
    """The state after a step along the gradient; where it `failed`, the one before but for that."""
    update, moved = optimizer.update(gradient, state.optimizer, state.adapter)
    new = (optax.apply_updates(state.adapter, update), moved)
    old = (state.adapter, state.optimizer)
    adapter, inner = jax.tree.map(lambda n, o: jnp.where(failed, o, n), new, old)
    step = state.step + jnp.where(failed, 0, 1)
    return replace(state, step=step, adapter=adapter, optimizer=inner, failed=failed)

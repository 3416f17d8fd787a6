"""Gates for routing: a vector at each projection that learns which tokens its module is for.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization"
(PHATGOOSE, 2402.05859), section 3.2: the module is frozen and its output multiplied by the sigmoid
of x·v, from v = 0; v alone is trained, on the module's own data and loss, for about 100 steps.
`compose.routing` routes by the gates of a library.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, Experts, LoRA, fold_scale
from train.batches import Plan, assemble, batches_from
from train.loss import Batch, batch_loss

Gates = dict[str, jax.Array]  # (N, I) by projection
Step = Callable[[Any, Gates, Any, Batch], tuple[Gates, Any, jax.Array]]


def first_gates(adapter: Adapter) -> Gates:
    """The gates (N, I) that a module begins with: zeros, which let half of everything through."""
    found = {path: type(m).__name__ for path, m in adapter.items() if not isinstance(m, LoRA)}
    refuse_all(
        [f"{path} holds {kind}" for path, kind in found.items()], "gates are of LoRA modules"
    )
    if not adapter:
        raise InputError("the base model has no module to gate; give an adapter")
    loras = {path: m for path, m in adapter.items() if isinstance(m, LoRA)}
    return {path: jnp.zeros(m.a.shape[:-1], jnp.float32) for path, m in loras.items()}


def gated(adapter: Adapter, gates: Gates) -> dict[str, Experts]:
    """The module with each of its outputs multiplied by sigmoid(x·v): one expert, weighed alone."""

    def one(module: Any, gate: jax.Array) -> Experts:
        """The projection's module and gate, as a library of one."""
        a, b = (x[..., None, :, :] for x in (module.a, fold_scale(module).b))
        return Experts(a, b, gate[..., None, :], top_k=1, score="signed", weighting="sigmoid")

    return {path: one(module, gates[path]) for path, module in adapter.items()}


def make_step(
    config: models.Config, adapter: Adapter, optimizer: optax.GradientTransformation
) -> Step:
    """A pure step: weights, gates, the optimiser's state and a batch to both anew, and the loss.

    The loss is the mean over the batch's labels, in nats, before the step; `adapter` is frozen.
    """

    def loss(gates: Gates, weights: Any, batch: Batch) -> jax.Array:
        """The mean loss a label under these gates."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        total = batch_loss(config, weights, gated(adapter, gates), flat)
        return total / jnp.maximum(batch.weights.sum(), 1)

    def step(weights: Any, gates: Gates, state: Any, batch: Batch) -> tuple[Gates, Any, jax.Array]:
        """The gates and the optimiser's state after a step, and the loss before it."""
        value, gradient = jax.value_and_grad(loss)(gates, weights, batch)
        update, state = optimizer.update(gradient, state, gates)
        moved: Any = optax.apply_updates(gates, update)
        return moved, state, value

    return step


def train_gates(
    config: models.Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    plan: Plan,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Gates, np.ndarray]:
    """The gates of a module after `steps` of AdamW on its data, and the loss (steps,) of each step.

    `train.data.plan_data` plans the data. The same seed gives the same bits. A loss that is not
    finite is refused.
    """
    optimizer = optax.adamw(learning_rate, weight_decay=0.0)
    gates = first_gates(adapter)
    state, step = optimizer.init(gates), jax.jit(make_step(config, adapter, optimizer))
    batches, losses = batches_from(plan, seed, 0), []
    for _ in range(steps):
        gates, state, value = step(weights, gates, state, assemble(plan, next(batches)))
        losses.append(value)
    told = np.asarray(jax.device_get(losses), np.float32)
    if not np.isfinite(told).all():
        first = int(np.argmin(np.isfinite(told))) + 1
        raise InputError(
            f"step {first} of the gates gave loss {told[first - 1]}; lower learning_rate"
        )
    return gates, told

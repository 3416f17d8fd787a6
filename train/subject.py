"""What a run's optimiser moves: a module, or whatever a module is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.modules import Adapter


def _itself(frozen: Any, trained: Any) -> tuple[Any, Adapter]:
    return frozen, trained


def _free(trained: Any) -> jax.Array:
    return jnp.zeros(())


@dataclass(frozen=True)
class Subject:
    """How what is frozen and what is trained make a forward pass; by default they are its own."""

    applied: Callable[[Any, Any], tuple[Any, Adapter]] = _itself  # the base's weights, a module
    penalty: Callable[[Any], jax.Array] = _free  # added to the loss
    bound: float | None = None  # of the size of every number that is trained


MODULE = Subject()


def bounded(limit: float) -> optax.GradientTransformation:
    """Steps that end within ±limit."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        """The steps, cut where they would lead outside."""
        cut = jax.tree.map(lambda s, x: jnp.clip(x + s, -limit, limit) - x, updates, params)
        return cut, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

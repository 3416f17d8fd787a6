"""A pure function of (config, weights, adapter, batch) over stacked adapters and all devices.

The rows of a batch are spread over the devices by a mesh and `jit`, or by `pmap`; "one" uses the
first device alone. The numbers are the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.mesh import make_mesh, put_batch, replicated

Devices = Literal["mesh", "pmap", "one"]
Pure = Callable[[models.Config, Any, Any, Any], jax.Array]  # gives (B, ...)
Run = Callable[[Any, Any, int], jax.Array]  # stacked adapters, batch, M; gives (M, B, ...)


def row_multiple(devices: Devices) -> int:
    """What the number of a batch's rows must be a multiple of."""
    return 1 if devices == "one" else jax.device_count()


def place(weights: Any, devices: Devices) -> Any:
    """A base model's weights on every device, as `spread` takes them; done once a run."""
    if devices == "mesh":
        return jax.device_put(weights, replicated(make_mesh()))
    if devices == "pmap":
        copy = jax.pmap(lambda _, weights: weights, in_axes=(0, None))
        return copy(jnp.arange(jax.device_count()), weights)
    return weights


def spread(pure: Pure, config: models.Config, placed: Any, devices: Devices) -> Run:
    """`pure` of each adapter of a stack, compiled, its batch's rows spread over the devices."""
    stacked = partial(over_adapters, pure, config)
    if devices == "pmap":
        return _pmapped(stacked, placed)
    mesh = make_mesh() if devices == "mesh" else None
    program = jax.jit(stacked, static_argnums=3)
    return lambda adapters, batch, count: program(placed, adapters, put_batch(batch, mesh), count)


def over_adapters(
    pure: Pure, config: models.Config, weights: Any, adapters: Any, batch: Any, count: int
) -> jax.Array:
    """`pure` of each of `count` adapters along their leading axis, (M, B, ...)."""
    each = jax.vmap(lambda adapter: pure(config, weights, adapter, batch), axis_size=count)
    return each(adapters)


def _pmapped(stacked: Callable[..., jax.Array], placed: Any) -> Run:
    """`stacked` under `pmap`, each device with an equal share of the rows."""
    program = jax.pmap(stacked, in_axes=(0, None, 0), out_axes=1, static_broadcasted_argnums=3)

    def run(adapters: Any, batch: Any, count: int) -> jax.Array:
        split = jax.tree.map(lambda x: x.reshape(jax.device_count(), -1, *x.shape[1:]), batch)
        out = program(placed, adapters, split, count)  # (M, devices, rows, ...)
        return out.reshape(count, -1, *out.shape[3:])

    return run

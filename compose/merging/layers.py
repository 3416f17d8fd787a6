"""A merging function run over a projection's layers, one after another."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from compose.merging.magnitude import Share
from compose.merging.members import Members
from compose.merging.truncate import truncated
from compose.weights import Weight

Array = jax.Array
Function = Callable[..., Any]


def by_layer(
    function: Function,
    members: Members,
    weights: Sequence[Weight],
    lead: tuple[int, ...],
    *,
    key: Array | None,
    options: Mapping[str, Any],
    fishers: Members | None = None,
    rank: int | None = None,
) -> Any:
    """What `function` makes of members (M, *lead, ...), layer by layer: leaves (*lead, ...).

    `weights` are one a member, () or (*lead) each. With a `rank`, the tensor of each layer is
    brought down to it at once: (a, b, error). The `key` of a layer is folded with its number.
    """
    fixed = {name: v for name, v in options.items() if not isinstance(v, jax.Array | Share)}
    traced = {name: v for name, v in options.items() if name not in fixed}
    return _run(
        function, rank, tuple(sorted(fixed.items())), lead, traced, key, members, fishers, weights
    )


def _layers_first(x: Array, lead: tuple[int, ...]) -> Array:
    """(M, *lead, ...) as (L, M, ...)."""
    return jnp.swapaxes(x.reshape(len(x), prod(lead), *x.shape[1 + len(lead) :]), 0, 1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    function: Function,
    rank: int | None,
    fixed: tuple[tuple[str, Any], ...],
    lead: tuple[int, ...],
    traced: dict[str, Array],
    key: Array | None,
    members: Members,
    fishers: Members | None,
    weights: Sequence[Weight],
) -> Any:
    """`function` of every layer, compiled once for a projection's shapes."""
    columns = [jnp.broadcast_to(jnp.asarray(w, jnp.float32), lead).ravel() for w in weights]
    members, fishers = jax.tree.map(partial(_layers_first, lead=lead), (members, fishers))

    def one(layer: tuple) -> Any:
        """One layer's result."""
        number, members, fishers, weights = layer
        options = dict(fixed) | traced
        if key is not None:
            options["key"] = jax.random.fold_in(key, number)
        if fishers is not None:
            options["fishers"] = fishers
        with jax.default_matmul_precision("highest"):
            found = function(members, weights, **options)
        return found if rank is None else truncated(found, rank)

    layers = (jnp.arange(prod(lead)), members, fishers, jnp.stack(columns, axis=1))
    found = jax.lax.map(one, layers)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)

"""Mixing weights: one for a whole module, one a layer, or either by projection.

Weights may be traced, so that they can be learned, swept and differentiated.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError

Weight = float | jax.Array  # (), or (N,): one a layer
Mixing = Weight | Mapping[str, Weight]  # by projection; one that it leaves out is not mixed in
Weights = Sequence[Mixing] | jax.Array  # one a module


def at(weight: Mixing, path: str) -> Weight:
    """A module's weight at a projection; 0 where a mapping has none."""
    return weight.get(path, 0.0) if isinstance(weight, Mapping) else weight


def refuse_lost(weights: Weights, paths: Collection[str]) -> None:
    """Refuses weights for a projection that no module changes."""
    named = (path for w in weights if isinstance(w, Mapping) for path in w)
    if lost := sorted({path for path in named if path not in paths}):
        raise InputError(
            f"a weight for {', '.join(lost)}, which no module changes; they change "
            f"{', '.join(paths)}"
        )


def shares(weights: Weights, paths: Iterable[str]) -> Weights:
    """The weights over their total, at each of the `paths` if any of them is by projection."""
    plain: list[Weight] = [weight for weight in weights if not isinstance(weight, Mapping)]
    if len(plain) == len(weights):
        total = sum(plain)
        return [weight / total for weight in plain]
    totals = {path: sum(at(weight, path) for weight in weights) for path in paths}
    return [{path: at(w, path) / total for path, total in totals.items()} for w in weights]


def times(weight: Weight, x: jax.Array) -> jax.Array:
    """w·x in x's type, for one weight or one for each of x's layers (N, ...)."""
    return (over_layers(weight, x) * x).astype(x.dtype)


def over_layers(weight: Weight, x: jax.Array | jax.ShapeDtypeStruct) -> Weight:
    """A weight in a shape that meets x's layers (N, ...)."""
    layers = jnp.ndim(weight)
    if layers and jnp.shape(weight) != x.shape[:layers]:
        raise InputError(
            f"weights of shape {jnp.shape(weight)} do not fit a module of {len(x)} layers; "
            f"give one number, or one a layer"
        )
    return jnp.reshape(weight, jnp.shape(weight) + (1,) * (x.ndim - layers)) if layers else weight


def over_depth(points: Sequence[float], layers: int) -> jax.Array:
    """Weights (N,) that go through `points` from the first layer to the last in straight lines.

    As mergekit's gradients: [0, 1] rises evenly, [1, 0, 1] falls and rises again.
    """
    if not len(points):
        raise InputError("a weight over depth needs at least one number")
    places = jnp.linspace(0, len(points) - 1, layers)
    return jnp.interp(places, jnp.arange(len(points)), jnp.asarray(points, jnp.float32))

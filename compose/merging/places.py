"""One projection's modules merged, whatever their kind and in whichever space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from compose import lowrank
from compose.arithmetic import Space, delta_sum
from compose.decompositions import ratio, wide
from compose.library import stack
from compose.merging.layers import by_layer
from compose.merging.magnitude import share_of
from compose.merging.members import Members
from compose.merging.methods import ELEMENTWISE, LOW_RANK, MEANS, VECTOR
from compose.option_values import STATIC
from compose.weights import Weight, over_layers
from lora_jax.modules import IA3, Adapter, LoRA, Module, Saved

Array = jax.Array


@dataclass(frozen=True)
class Place:
    """What is merged at one projection, and with what."""

    path: str
    adapters: list[Adapter]  # of this projection alone; empty where it is left alone
    fishers: list[Adapter] | None
    weights: list[Weight]
    key: Array | None
    options: dict[str, Any]

    def stacked(self, adapters: Sequence[Adapter]) -> Any:
        """Adapters' modules here with an axis M in front; a missing one is zeros."""
        return stack(adapters)[self.path]


def merged_at(
    place: Place, method: str, space: Space, rank: int | None
) -> tuple[Module, Array | None]:
    """One projection's modules merged, and a LoRA's relative errors by layer."""
    first: Any = next(adapter[place.path] for adapter in place.adapters if adapter)
    lead = first.a.shape[:-2] if isinstance(first, LoRA) else ()
    if isinstance(first, Saved):
        return delta_sum(place.adapters, place.weights)[place.path], None
    if isinstance(first, LoRA) and space == "factor":
        return _factors(place, method, first), jnp.zeros(lead, jnp.float32)
    together = place.stacked(place.adapters)
    if isinstance(first, IA3):
        return replace(together, offset=_vectors(place, method, together.offset)), None
    if method in LOW_RANK:
        found = _by_layer(place, LOW_RANK[method], together, together.a, lead)
        return lowrank.recompress(found, rank or found.a.shape[-1])
    return _deltas(place, method, together, rank or _ranks(place))


def _by_layer(
    place: Place,
    function: Callable[..., Any],
    members: Members,
    like: Array,
    lead: tuple[int, ...],
    **more: Any,
) -> Any:
    """A merging function over the layers of members (M, *lead, ...), of which `like` is a leaf."""
    one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
    weights = [over_layers(weight, one) for weight in more.pop("weights", place.weights)]
    flat = [jnp.reshape(w, lead) if jnp.ndim(w) else w for w in weights]
    options = _traced(place.options, _size(members, lead) if function in _ENTRYWISE else None)
    given: dict[str, Any] = {"key": place.key, "options": options} | more
    return by_layer(function, members, flat, lead, **given)


_ENTRYWISE = set(ELEMENTWISE.values())


def _traced(options: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Options whose plain numbers are arrays, so that another value compiles nothing anew.

    A share of entries goes with its count among `size`; where that is not known it stays as it is,
    as do those from 1 on, which drop nothing, and what shapes depend on.
    """
    found = dict(options)
    for name, value in options.items():
        if not isinstance(value, float) or name in STATIC:
            continue
        if name not in ("density", "gamma"):
            found[name] = jnp.float32(value)
        elif size is not None and value < 1:
            found[name] = share_of(value, size)
    return found


def _size(members: Members, lead: tuple[int, ...]) -> int:
    """How many entries a tensor of one member has at one layer."""
    if isinstance(members, LoRA):
        return members.a.shape[-2] * members.b.shape[-1]
    return prod(members.shape[1 + len(lead) :])


def _vectors(place: Place, method: str, offset: Array) -> Array:
    """IA3's offsets (M, *lead, F) merged."""
    fishers = None if place.fishers is None else place.stacked(place.fishers).offset
    lead = offset.shape[1:-1]
    found = _by_layer(place, VECTOR[method], offset, offset, lead, fishers=fishers)
    return found.astype(offset.dtype)


def _factors(place: Place, method: str, like: LoRA) -> LoRA:
    """a's merged, and b's: with weights sign·√|ws| and √|ws|, as PEFT's, and scale 1.

    They are of the types of `like`'s. A mean's weights would cancel; there √|s| goes into the
    factors instead.
    """
    modules: list[Any] = [adapter.get(place.path) for adapter in place.adapters]
    scales = [1.0 if module is None else module.scale for module in modules]
    plain = [{place.path: m.replace(scale=1.0)} if m is not None else {} for m in modules]
    members = place.stacked(plain)
    fishers = None if place.fishers is None else place.stacked(place.fishers)
    if method in MEANS:
        members, fishers = _with_scales(members, fishers, jnp.array(scales))
        weights = {"a": place.weights, "b": place.weights}
    else:
        scaled = [w * s for w, s in zip(place.weights, scales, strict=True)]
        sizes = [jnp.sqrt(jnp.abs(w)) for w in scaled]
        signed = [jnp.where(w >= 0, x, -x) for w, x in zip(scaled, sizes, strict=True)]
        weights = {"a": signed, "b": sizes}
    merged = {}
    for number, side in enumerate(weights):
        x = getattr(members, side)
        found = _by_layer(
            place,
            ELEMENTWISE[method],
            wide(x),
            x,
            x.shape[1:-2],
            weights=weights[side],
            key=None if place.key is None else jax.random.fold_in(place.key, number),
            fishers=None if fishers is None else getattr(fishers, side),
        )
        merged[side] = found.astype(getattr(like, side).dtype)
    return LoRA(**merged)


def _with_scales(members: LoRA, fishers: LoRA | None, scales: Array) -> tuple[LoRA, LoRA | None]:
    """Factors times √|s|, a's with the sign of s, and their Fisher information over |s|."""
    size = jnp.abs(scales).reshape(-1, *[1] * (members.a.ndim - 1))
    sign = jnp.sign(scales).reshape(size.shape)
    members = LoRA(sign * jnp.sqrt(size) * members.a, jnp.sqrt(size) * members.b)
    return members, fishers and LoRA(ratio(fishers.a, size), ratio(fishers.b, size))


def _ranks(place: Place) -> int:
    """The sum of the modules' ranks."""
    modules: list[Any] = [adapter[place.path] for adapter in place.adapters if adapter]
    return sum(module.a.shape[-1] for module in modules)


def _deltas(place: Place, method: str, together: LoRA, rank: int) -> tuple[LoRA, Array]:
    """Dense deltas merged a layer at a time, each brought down to a rank at once."""
    lead = together.a.shape[1:-2]
    fishers = None if place.fishers is None else _unscaled(place.stacked(place.fishers))
    a, b, error = _by_layer(
        place,
        ELEMENTWISE[method],
        _unscaled(together),
        together.a,
        lead,
        fishers=fishers,
        rank=rank,
    )
    return LoRA(a.astype(together.a.dtype), b.astype(together.b.dtype)), error


def _unscaled(module: LoRA) -> LoRA:
    """The same delta in float32 with its scale in b: scales are static, and would recompile."""
    return LoRA(module.a, module.scale * wide(module.b))

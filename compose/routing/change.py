"""Experts added to a routed library and taken from it, the others untouched."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.library import Routing, Vectors
from compose.routing.build import experts
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, Experts, LoRA

Array = jax.Array
_PARTS = {"a": -3, "b": -3, "prototypes": -2, "spectrum": -2}  # the axis M of each leaf
_ROUTES = {
    "arrow": "prototypes",
    "gates": "prototypes",
    "activations": "prototypes",
    "spectr": "spectrum",
    "spectr-code": "spectrum",
    "uniform": "shares",
}


def with_expert(
    routed: Mapping[str, Experts],
    adapter: Adapter,
    routing: Routing,
    vectors: Vectors | None = None,
) -> dict[str, Experts]:
    """The routed library with one more module behind the rest, under the library's own `routing`.

    Only the new module is decomposed. The others' numbers stay the same bits; a module of a higher
    rank gives them zeros behind theirs. `vectors` are the new module's, where tokens are routed by
    gates or activations.
    """
    _refuse_misfits(routed, adapter, routing)
    whole = {path: adapter.get(path, _nothing(held)) for path, held in routed.items()}
    new = experts([whole], routing, [vectors or {}])
    joined = {path: _joined(held, new[path]) for path, held in routed.items()}
    return _evened(joined) if routing.router == "uniform" else joined


def without_expert(routed: Mapping[str, Experts], number: int) -> dict[str, Experts]:
    """The routed library without its module of this number, counted from 0.

    The others' numbers stay the same bits; of fewer modules than top_k, all are taken.
    """
    count = _count(routed)
    if any(_route(held) == "weights" for held in routed.values()):
        raise InputError("these modules have given weights; give the others theirs anew")
    if not 0 <= number < count:
        raise InputError(f"no module {number} to take out; there are 0 to {count - 1}")
    if count == 1:
        raise InputError("the last module of a routed library cannot be taken out; use the base")
    return _evened({path: _less(held, number) for path, held in routed.items()})


def _less(held: Experts, number: int) -> Experts:
    """The experts without the one of this number."""
    leaves: dict[str, Any] = {
        name: jnp.delete(leaf, number, axis=axis)
        for name, axis in _PARTS.items()
        if (leaf := getattr(held, name)) is not None
    }
    return replace(held, top_k=min(held.top_k, held.a.shape[-3] - 1), **leaves)


def _count(routed: Mapping[str, Experts]) -> int:
    """How many modules the library has."""
    return next(iter(routed.values())).a.shape[-3]


def _refuse_misfits(routed: Mapping[str, Experts], adapter: Adapter, routing: Routing) -> None:
    """Refuses a module that has no place in a routed library, naming all that is amiss."""
    problems = []
    if not routed:
        problems.append("it is empty; compose.routing.build.route makes one")
    for path, module in adapter.items():
        if path not in routed:
            problems.append(f"it has no module at {path}; route the library anew with the new one")
        elif not isinstance(module, LoRA) or module.bias is not None:
            problems.append(f"{path}: Arrow routes LoRA modules; got {type(module).__name__}")
        elif _size(module) != (size := _size(routed[path])):
            problems.append(f"{path}: the new module is {_size(module)}, the library's {size}")
    if any(_route(held) != _ROUTES[routing.router] for held in routed.values()):
        problems.append(f"it is not routed by {routing.router}; give the routing it was made with")
    refuse_all(problems, "the routed library")


def _route(held: Experts) -> str:
    """What experts are routed by: the name of a leaf, or "weights" that were given one by one."""
    if held.shares is not None:
        return "shares" if held.top_k == held.shares.shape[-1] else "weights"
    return "prototypes" if held.spectrum is None else "spectrum"


def _size(module: Any) -> str:
    """A module's layers and widths, in words."""
    lead = module.a.shape[: -3 if isinstance(module, Experts) else -2]
    return f"{' x '.join(map(str, lead))} layers, {module.a.shape[-2]} to {module.b.shape[-1]}"


def _nothing(held: Experts) -> LoRA:
    """A module that adds nothing, where the new one has none."""
    return LoRA(jnp.zeros_like(held.a[..., 0, :, :1]), jnp.zeros_like(held.b[..., 0, :1, :]))


def _joined(held: Experts, new: Experts) -> Experts:
    """The experts of both, the new ones behind."""
    rank = max(held.a.shape[-1], new.a.shape[-1])
    both = [_padded(held, rank), _padded(new, rank)]
    leaves: dict[str, Any] = {}
    for name, axis in _PARTS.items():
        first, second = (getattr(one, name) for one in both)
        if first is not None:
            leaves[name] = jnp.concatenate([first, second.astype(first.dtype)], axis=axis)
    return replace(held, leading=held.leading and new.leading, **leaves)


def _padded(held: Experts, rank: int) -> Experts:
    """The same experts at a larger rank, zeros behind theirs."""
    more = rank - held.a.shape[-1]

    def pad(leaf: Array, axis: int) -> Array:
        return jnp.pad(leaf, [(0, more if n == leaf.ndim + axis else 0) for n in range(leaf.ndim)])

    spectrum = None if held.spectrum is None else pad(held.spectrum, -1)
    return replace(held, a=pad(held.a, -1), b=pad(held.b, -2), spectrum=spectrum)


def _evened(routed: dict[str, Experts]) -> dict[str, Experts]:
    """The same experts, with equal shares where shares are what they are mixed by."""

    def one(held: Experts) -> Experts:
        if held.shares is None:
            return held
        *lead, count = held.a.shape[:-2]
        return replace(held, top_k=count, shares=jnp.full((*lead, count), 1 / count))

    return {path: one(held) for path, held in routed.items()}

"""Experts added to a routed library and taken from it, the others untouched."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.library import Routing, Vectors
from compose.routing.build import experts
from compose.routing.settings import USUAL, refuse_routing
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, Experts, LoRA

Array = jax.Array
_PARTS = {"a": -3, "b": -3, "prototypes": -2, "spectrum": -2}  # the axis M of each leaf
_ROUTES = {
    "arrow": "absolute",
    "gates": "signed",
    "activations": "signed",
    "spectr": "spectrum",
    "spectr-code": "spectrum",
    "uniform": "even",
}
_SETTINGS = ("temperature", "mixing", "inputs", "weighting")


def with_expert(
    routed: Mapping[str, Experts],
    adapter: Adapter,
    routing: Routing,
    vectors: Vectors | None = None,
    *,
    top_k: int | None = None,
) -> dict[str, Experts]:
    """The routed library with one more module behind the rest, under the library's own `routing`.

    Only the new module is decomposed. The others' numbers stay the same bits; a module of a higher
    rank gives them zeros behind theirs. `vectors` are the new module's, where tokens are routed by
    gates or activations. `top_k` is how many a token takes from now on: unless given, as many as
    `routing` says; where that is all there were, the router's usual number if it is larger.
    """
    count = _count(routed)
    asked = min(routing.top_k, count + 1) if top_k is None else top_k
    refuse_routing(replace(routing, top_k=asked), count + 1)
    _refuse_misfits(routed, adapter, routing, vectors or {})
    whole = {path: adapter.get(path, _nothing(held)) for path, held in routed.items()}
    new = experts([whole], routing, [vectors or {}])
    _refuse_other_settings(routed, new, routing, top_k)
    taken = _usual_top_k(routing, count) if top_k is None else top_k
    joined = {path: _joined(held, new[path], taken) for path, held in routed.items()}
    return _evened(joined) if routing.router == "uniform" else joined


def _usual_top_k(routing: Routing, count: int) -> int:
    """How many of `count` modules and one more a token takes where nobody says."""
    cut = routing.top_k == count  # or so it may be: to the few modules that there were
    wanted = max(count, USUAL[routing.router].top_k) if cut else routing.top_k
    return min(wanted, count + 1)


def without_expert(routed: Mapping[str, Experts], number: int) -> dict[str, Experts]:
    """The routed library without its module of this number, counted from 0.

    The others' numbers stay the same bits; of fewer modules than top_k, all are taken.
    """
    count = _count(routed)
    _refuse_given(routed)
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
    return next((held.a.shape[-3] for held in routed.values()), 0)


def _refuse_given(routed: Mapping[str, Experts]) -> None:
    """Refuses modules whose weights were given, for nobody knows those of other modules."""
    if any(_route(held) == "given" for held in routed.values()):
        raise InputError(
            "these modules have given weights; change the library, and give weights for all of "
            "it anew by compose.routing.given.with_weights"
        )


def _refuse_other_settings(
    routed: Mapping[str, Experts], new: Mapping[str, Experts], routing: Routing, top_k: int | None
) -> None:
    """Refuses a routing by which the new module would be routed otherwise than the others."""
    pairs = ((held, new[path]) for path, held in routed.items())
    problems = list(dict.fromkeys(told for pair in pairs for told in _differing(*pair, routing)))
    if problems:
        problems.append("give the routing that it was made with")
    had = next(iter(routed.values())).top_k
    asked = min(routing.top_k, _count(routed))
    if routing.router == "uniform":
        problems += [] if top_k is None else ["uniform takes all modules; leave top_k out"]
    elif top_k is None and had != asked:
        told = f"top_k is {had} there and {asked} in the routing"
        problems.append(f"{told}; with_expert's own top_k says how many from now on")
    refuse_all(problems, "the routed library")


def _differing(held: Experts, new: Experts, routing: Routing) -> list[str]:
    """The settings in which a projection's experts differ from a new one, in words."""
    pairs = {name: (getattr(held, name), getattr(new, name)) for name in _SETTINGS}
    told = [
        f"{name} is {old} there and {given} in the routing"
        for name, (old, given) in pairs.items()
        if old != given
    ]
    if not told and held.leading != new.leading:
        settings = f"{routing.inputs} inputs and {routing.prototypes} prototypes"
        return [f"inputs or prototypes are others there than the routing's {settings}"]
    return told


def _refuse_misfits(
    routed: Mapping[str, Experts], adapter: Adapter, routing: Routing, vectors: Vectors
) -> None:
    """Refuses a module that has no place in a routed library, naming all that is amiss."""
    _refuse_given(routed)
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
    lost = [path for path in adapter if path not in vectors]
    if lost and routing.router in ("gates", "activations"):
        told = f"{routing.router} needs the new module's vectors at {', '.join(lost)}"
        problems.append(f"{told}; give them as vectors")
    if any(_route(held) != _ROUTES[routing.router] for held in routed.values()):
        problems.append(f"it is not routed by {routing.router}; give the routing it was made with")
    refuse_all(problems, "the routed library")


def _route(held: Experts) -> str:
    """What experts are routed by, in a word: a score, a spectrum, even or given shares."""
    if held.shares is not None:
        return "even" if held.weighting == "uniform" else "given"
    return held.score if held.spectrum is None else "spectrum"


def _size(module: Any) -> str:
    """A module's layers and widths, in words."""
    lead = module.a.shape[: -3 if isinstance(module, Experts) else -2]
    return f"{' x '.join(map(str, lead))} layers, {module.a.shape[-2]} to {module.b.shape[-1]}"


def _nothing(held: Experts) -> LoRA:
    """A module that adds nothing, where the new one has none."""
    return LoRA(jnp.zeros_like(held.a[..., 0, :, :1]), jnp.zeros_like(held.b[..., 0, :1, :]))


def _joined(held: Experts, new: Experts, top_k: int) -> Experts:
    """The experts of both, the new ones behind, of which a token takes `top_k`."""
    rank = max(held.a.shape[-1], new.a.shape[-1])
    both = [_padded(held, rank), _padded(new, rank)]
    leaves: dict[str, Any] = {}
    for name, axis in _PARTS.items():
        first, second = (getattr(one, name) for one in both)
        if first is not None:
            leaves[name] = jnp.concatenate([first, second.astype(first.dtype)], axis=axis)
    return replace(held, top_k=top_k, **leaves)


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

"""Libraries: several modules of one base model, by name; and adapters stacked along an axis M."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from compose.align import by_projection, common_rank, common_scale
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA, Module, Saved

Vectors = Mapping[str, jax.Array]  # (N, I) by projection: a module's gates, or its mean inputs


@dataclass(frozen=True)
class Routing:
    """How a library is to be routed; `compose.option_values` has what each may be."""

    top_k: int = 3
    temperature: float | str = 1.0  # or "sqrt(d)", the root of the projection's input width
    mixing: str = "outputs"
    router: str = "arrow"
    inputs: str = "raw"
    prototypes: str = "own"
    weighting: str = "softmax"


@struct.dataclass
class Library:
    """Named modules of one base model, and how to route over them if they are to be routed.

    `vectors` are what a router was given for each module, by the router: "gates", "activations".
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    adapters: tuple[Adapter, ...]
    routing: Routing | None = struct.field(pytree_node=False, default=None)
    vectors: Mapping[str, tuple[Vectors, ...]] = struct.field(default_factory=dict)

    def map(self, function: Callable[[Adapter], Adapter]) -> "Library":
        """The library with `function` applied to each of its modules."""
        return replace(self, adapters=tuple(map(function, self.adapters)))


def join(libraries: Sequence[Library]) -> Library:
    """One library of all their modules, unrouted; a name already taken gets a number.

    A module without the vectors that others have gets none.
    """
    names: list[str] = []
    for name in (name for library in libraries for name in library.names):
        copies = (f"{name}_{n}" for n in range(2, len(names) + 3))
        names.append(name if name not in names else next(c for c in copies if c not in names))
    adapters = (adapter for library in libraries for adapter in library.adapters)
    routers = dict.fromkeys(router for library in libraries for router in library.vectors)
    vectors = {router: tuple(_vectors(libraries, router)) for router in routers}
    return Library(tuple(names), tuple(adapters), vectors=vectors)


def _vectors(libraries: Sequence[Library], router: str) -> Iterator[Vectors]:
    """The vectors of every module for a router, in order."""
    for library in libraries:
        yield from library.vectors.get(router) or ({},) * len(library.names)


def each(function: Callable[..., Adapter], *values: Adapter | Library) -> Adapter | Library:
    """`function` of adapters; where values are libraries, of each of their modules in turn.

    Several libraries are taken member by member, and so their names must agree; what else the
    result has, such as its routing, is the first one's.
    """
    libraries = [value for value in values if isinstance(value, Library)]
    if not libraries:
        return function(*values)
    first, *others = libraries
    for other in others:
        _refuse_other_names(first.names, other.names)

    def of(number: int) -> Adapter:
        """`function` of the members of this number, and of the values that are no library."""
        return function(*(v.adapters[number] if isinstance(v, Library) else v for v in values))

    return replace(first, adapters=tuple(map(of, range(len(first.names)))))


def _refuse_other_names(first: tuple[str, ...], other: tuple[str, ...]) -> None:
    """Refuses two libraries whose members are not called the same, in the same order."""
    if first == other:
        return
    alone = [name for name in first if name not in other], [n for n in other if n not in first]
    mine, others = (", ".join(names) or "none" for names in alone)
    differ = f"one alone has {mine}, the other {others}"
    if not any(alone):
        differ = f"they are {', '.join(first)} in one and {', '.join(other)} in the other"
    raise InputError(
        f"two libraries are combined member by member, and their names must agree: {differ}; "
        f"take member() or mean() of one, or the library() of both"
    )


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with an axis M in front of every leaf: (M, N, ...).

    Ranks are padded with zeros to the largest, unequal scales folded into b, and a projection that
    a module leaves alone gets zeros. No member's delta changes.
    """
    table = by_projection(adapters)
    return {path: _stack_modules(modules) for path, modules in table.items()}


def _stack_modules(modules: list[Module | None]) -> Module:
    """One projection's modules along a new axis in front; a missing one is zeros."""
    loras = [module for module in modules if isinstance(module, LoRA)]
    others: list[Any] = [module for module in modules if not isinstance(module, LoRA | None)]
    present: list[Any] = _shares_said(others, len(modules))
    present = common_rank(common_scale(loras)) if loras else present
    ready = iter(present)
    zero = jax.tree.map(jnp.zeros_like, present[0]) if None in modules else None
    filled = [zero if module is None else next(ready) for module in modules]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)


def _shares_said(modules: list[Module], wanted: int) -> list[Module]:
    """The same modules; where one of the `wanted` lacks a whole weight, all say their share."""
    whole = [module for module in modules if isinstance(module, Saved)]
    if not whole or (len(whole) == wanted and all(module.share is None for module in whole)):
        return modules
    return [Saved(m.value, jnp.ones(()) if m.share is None else m.share) for m in whole]


def unstack(stacked: Adapter) -> list[Adapter]:
    """The adapters along the axis M of a stacked one."""
    leaves, form = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(form, members) for members in zip(*leaves, strict=True)]

"""Slots: the adapters that rows of one batch run under, in buffers whose shapes never change.

`for_rows` is the simple way for a list of adapters. A server makes slots once, then puts adapters
in and takes them out while one compiled forward pass goes on. A slot holds a LoRA, a DoRA, an IA3,
a routed library, or nothing, which is the base.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from compose.slot_forms import Forms, Part, filled, forms, lead, refuse_misfits
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, PerExample

Array = jax.Array
Rows = Sequence[int] | np.ndarray | Array  # (B,), each row's slot


@struct.dataclass
class Slots:
    """Numbered places for adapters, at every projection that any of them may change."""

    parts: dict[str, tuple[Part, ...]]  # one of each kind; leaves (N, S, ...), scales 1
    count: int = struct.field(pytree_node=False)


def make_slots(like: Sequence[Adapter], count: int, *, rank: int = 1) -> Slots:
    """`count` empty slots, each for any adapter of the kinds, sizes and projections of `like`.

    Ranks may go up to `rank`, or to the largest in `like` if that is larger. Values do not matter:
    `init_lora` and `init_ia3` make good examples. Two kinds at one projection each get room.
    """
    if count < 1 or rank < 1:
        raise InputError(f"slots need a count and a rank of at least 1; got {count} and {rank}")

    def empty(form: Part) -> Part:
        """A part's slots, all zero: the identity of its kind."""
        at = lead(form)
        return jax.tree.map(
            lambda x: jnp.zeros((*x.shape[:at], count, *x.shape[at:]), x.dtype), form
        )

    shapes = forms(like, rank)
    return Slots({path: tuple(map(empty, parts)) for path, parts in shapes.items()}, count)


def put(slots: Slots, slot: int, adapter: Adapter) -> Slots:
    """The slots with an adapter in one of them, in place of what was there.

    The slots given are used up: their buffers become the result's. Only the first call compiles
    anything, whatever the adapters. One that does not fit is refused, with all that is amiss.
    """
    _refuse_missing([slot], slots.count)
    held = _forms_of(slots)
    refuse_misfits(held, adapter, f"the adapter does not fit slot {slot}")
    return _written(slots, np.int32(slot), filled(held, adapter))


def clear(slots: Slots, slot: int) -> Slots:
    """The slots with one of them empty, which is the base; the slots given are used up."""
    return put(slots, slot, {})


def assigned(slots: Slots, rows: Rows) -> dict[str, PerExample]:
    """The adapter of a batch (B, ...) whose row n runs under the adapter in slot `rows[n]`.

    `rows` (B,) may be traced; a slot that does not exist then turns its row to NaN.
    """
    index = jnp.asarray(rows, jnp.int32)
    if not isinstance(index, jax.core.Tracer):
        _refuse_missing(index, slots.count)

    def one(parts: tuple[Part, ...]) -> PerExample:
        """The slots of a projection and the rows', on every layer the same."""
        first = jax.tree.leaves(parts[0])[0]
        layers = first.shape[: lead(parts[0]) - 1]
        return PerExample(parts, jnp.broadcast_to(index, (*layers, len(index))))

    return {path: one(parts) for path, parts in slots.parts.items()}


def for_rows(adapters: Sequence[Adapter], rows: Rows) -> dict[str, PerExample]:
    """The adapter of a batch whose row n runs under `adapters[rows[n]]`; {} is the base."""
    shapes = forms(adapters)
    held = [filled(shapes, adapter) for adapter in adapters]

    def stacked(form: Part, *members: Part) -> Part:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, lead(form)), *members)

    parts = {
        path: tuple(map(stacked, form, *(member[path] for member in held)))
        for path, form in shapes.items()
    }
    return assigned(Slots(parts, len(adapters)), rows)


@partial(jax.jit, donate_argnums=0)
def _written(slots: Slots, slot: Array, new: dict[str, tuple[Part, ...]]) -> Slots:
    """The slots with modules of every kind, at every projection, in one of them."""

    def write(part: Part, module: Part) -> Part:
        axis = lead(module)
        return jax.tree.map(
            lambda held, x: jax.lax.dynamic_update_index_in_dim(held, x, slot, axis), part, module
        )

    parts = {path: tuple(map(write, parts, new[path])) for path, parts in slots.parts.items()}
    return Slots(parts, slots.count)


def _forms_of(slots: Slots) -> Forms:
    """The shapes that one slot's modules have."""

    def one(part: Any) -> Any:
        at = lead(part) - 1
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*x.shape[:at], *x.shape[at + 1 :]), x.dtype), part
        )

    return {path: tuple(map(one, parts)) for path, parts in slots.parts.items()}


def _refuse_missing(wanted: Rows, count: int) -> None:
    """Refuses slots that do not exist."""
    if missing := [int(slot) for slot in np.asarray(wanted) if not 0 <= slot < count]:
        told = ", ".join(map(str, missing))
        raise InputError(f"no slot {told}: there are {count}, counted from 0")

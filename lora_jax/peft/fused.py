"""Projections that one model fuses and another has apart: an adapter of either fits both.

A fused kernel holds its parts' columns side by side. Joined, the parts' b's become a block
diagonal and their ranks add up; cut apart, the parts share an a.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import IA3, DoRA, LoRA, Module, fold_scale
from lora_jax.peft.names import Slot

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Parts = tuple[tuple[str, int], ...]  # paths, and how many columns each has


@dataclass(frozen=True)
class Arranged:
    """The places for modules by the names that a file uses, and the way from there to the base."""

    slots: Mapping[str, Slot]
    joined: dict[str, Parts] = field(default_factory=dict)  # the base's path: the file's
    cut: dict[str, Parts] = field(default_factory=dict)  # the file's path: the base's


def arranged(slots: Mapping[str, Slot], stored: Iterable[str], config: models.Config) -> Arranged:
    """The places for modules: the file's where one has fused what the other has apart."""
    found = Arranged(slots)
    for name in stored:
        for fused, parts in PARTS.items():
            whole, pieces = renamed(name, fused), [renamed(name, part) for part in parts]
            if name in slots or name not in (whole, *pieces):
                continue
            if whole in slots:
                path, columns = slots[whole].path, widths(slots[whole], config)
                paths = (renamed(path, part) for part in parts)
                found.joined[path] = tuple(zip(paths, columns, strict=True))
            elif all(piece in slots for piece in pieces):
                path = renamed(slots[pieces[0]].path, fused)
                found.cut[path] = tuple((slots[p].path, slots[p].size[1]) for p in pieces)
    pairs = (pair for name, slot in slots.items() for pair in _in_file(name, slot, found))
    return replace(found, slots=dict(pairs))


def widths(slot: Slot, config: models.Config) -> tuple[int, ...]:
    """How many columns each part of a fused projection has."""
    total, keys = slot.size[1], config.kv_heads * config.head_width
    is_feed_forward = slot.path.endswith("gate_up_proj")
    return (total // 2,) * 2 if is_feed_forward else (total - 2 * keys, keys, keys)


def renamed(name: str, last: str) -> str:
    """A name with another last part."""
    stem, dot, _ = name.rpartition(".")
    return f"{stem}{dot}{last}"


def _in_file(name: str, slot: Slot, found: Arranged) -> list[tuple[str, Slot]]:
    """What a file has in the place of one of the base's; a fused one stands at its first part."""
    if slot.path in found.joined:
        parts = found.joined[slot.path]
        return [_like(name, slot, path, width) for path, width in parts]
    for whole, parts in found.cut.items():
        if slot.path == parts[0][0]:
            return [_like(name, slot, whole, sum(width for _, width in parts))]
        if slot.path in dict(parts):
            return []
    return [(name, slot)]


def _like(name: str, slot: Slot, path: str, width: int) -> tuple[str, Slot]:
    """A place beside another, of its own path and width."""
    return renamed(name, path.rpartition(".")[2]), replace(
        slot, path=path, size=(slot.size[0], width)
    )


def as_in_base(adapter: Mapping[str, Module], arranged: Arranged) -> dict[str, Module]:
    """An adapter at the file's paths as one at the base's, of equal deltas."""
    table = dict(adapter)
    for whole, parts in arranged.joined.items():
        table[whole] = _join(whole, [(table.pop(path, None), width) for path, width in parts])
    for whole, parts in arranged.cut.items():
        module, ends = table.pop(whole), list(accumulate(width for _, width in parts))
        for (path, width), end in zip(parts, ends, strict=True):
            table[path] = _columns(module, lambda x, e=end, w=width: x[..., e - w : e])
    return table


def _join(path: str, parts: list[tuple[Module | None, int]]) -> Module:
    """The module of a fused projection from those of its parts; a missing one is the identity."""
    total, left, wide = sum(width for _, width in parts), 0, []
    for module, width in parts:
        if isinstance(module, IA3) and module.on == "input":
            raise InputError(f"{path}: the base fuses it, and cannot rescale one part's input")
        if module is not None:
            sides = (left, total - left - width)
            wide.append(_columns(module, lambda x, s=sides: _padded(x, s)))
        left += width
    return _sum(wide)


def _sum(modules: list[Module]) -> Module:
    """Modules of one kind and size as one: LoRA's ranks add up, and what is a row each is added."""
    if scales := [module for module in modules if isinstance(module, IA3)]:
        return IA3(_total([module.offset for module in scales]))
    ranked = [module for module in modules if isinstance(module, LoRA | DoRA)]
    if len({module.scale for module in ranked}) > 1:
        ranked = [fold_scale(module) for module in ranked]
    a = jnp.concatenate([module.a for module in ranked], axis=-1)
    b = jnp.concatenate([module.b for module in ranked], axis=-2)
    if magnitudes := [module.magnitude for module in ranked if isinstance(module, DoRA)]:
        return DoRA(a, b, _total(magnitudes), ranked[0].scale)
    biases = [m.bias for m in ranked if isinstance(m, LoRA) and m.bias is not None]
    return LoRA(a, b, ranked[0].scale, _total(biases) if biases else None)


def _total(arrays: list[jax.Array]) -> jax.Array:
    """The sum of arrays, of which there is at least one."""
    return sum(arrays[1:], arrays[0])


def _padded(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Columns of zeros on both sides."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [sides])


def _columns(module: Module, change) -> Module:
    """A module with its output's columns changed: all that it has with an output axis."""
    match module:
        case LoRA(a, b, scale, bias):
            return LoRA(a, change(b), scale, None if bias is None else change(bias))
        case DoRA(a, b, magnitude, scale):
            return DoRA(a, change(b), change(magnitude), scale)
        case IA3(offset, "output"):
            return IA3(change(offset))
    return module

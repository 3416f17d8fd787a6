"""An adapter in parts, as PEFT stores it: one module a layer, without what padding added."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import IA3, DoRA, LoRA, Module
from lora_jax.peft import names
from lora_jax.peft.names import BIAS, MAGNITUDE, Slot

Slots = list[tuple[str, Slot]]


@dataclass(frozen=True)
class Part:
    """What PEFT stores of one module: its tensors by role, turned as they are there."""

    tensors: dict[str, np.ndarray]
    rank: int = 0  # of a LoRA
    scale: float = 1.0


def parts(adapter: Mapping[str, Module], config: models.Config) -> dict[str, Part]:
    """The adapter's modules by Hugging Face's name, in the model's order.

    Ranks and layers that hold only zeros are left out, unless all of the projection's do.
    """
    places: dict[str, Slots] = {}
    for name, slot in names.slots(config).items():
        if slot.path in adapter:
            places.setdefault(slot.path, []).append((name, slot))
    if lost := adapter.keys() - places.keys():
        raise InputError(f"this base model has no projection {', '.join(sorted(lost))}")
    biased = any(isinstance(m, LoRA) and m.bias is not None for m in adapter.values())
    found: dict[str, Part] = {}
    for path, slots in places.items():
        match adapter[path]:
            case IA3() as module:
                found |= _ia3(module, slots)
            case LoRA() | DoRA() as module:
                found |= _lora(module, slots, biased)
    return found


def _ia3(module: IA3, slots: Slots) -> dict[str, Part]:
    """One projection's scales: a row where its input is rescaled, else a column."""
    scales = np.asarray(1 + module.offset, np.float32).reshape(len(slots), -1)
    shape = (1, -1) if module.on == "input" else (-1, 1)
    rows = zip(slots, scales, strict=True)
    return {name: Part({"ia3_l": row.reshape(shape)}) for (name, _), row in rows}


def _lora(module: LoRA | DoRA, slots: Slots, biased: bool) -> dict[str, Part]:
    """One projection's factors by layer, each with its magnitudes, or its bias if any has one."""
    count, width = len(slots), module.b.shape[-1]
    a = np.asarray(module.a, np.float32).reshape(count, -1, module.a.shape[-1])
    b = np.asarray(module.b, np.float32).reshape(count, -1, width)
    role, rows = (MAGNITUDE, module.magnitude) if isinstance(module, DoRA) else (BIAS, module.bias)
    rows = np.zeros(width) if rows is None else rows
    rows = np.broadcast_to(np.asarray(rows, np.float32), (count, width))
    used = [_used(x, y, row) for x, y, row in zip(a, b, rows, strict=True)]
    ranks = used if any(used) else [a.shape[-1]] * count
    found = {}
    for n, ((name, slot), rank) in enumerate(zip(slots, ranks, strict=True)):
        kind, end = ("lora_embedding_", "") if slot.embedding else ("lora_", ".weight")
        tensors = {f"{kind}A{end}": a[n, :, :rank].T, f"{kind}B{end}": b[n, :rank].T}
        if role == MAGNITUDE or biased:
            tensors[role] = rows[n]
        if rank:
            found[name] = Part(tensors, rank, module.scale)
    return found


def _used(a: np.ndarray, b: np.ndarray, row: np.ndarray) -> int:
    """How many of a layer's ranks hold something; at least one if the layer does."""
    held = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
    return int(held[-1]) + 1 if held.size else int(row.any())


def scaled(parts: Mapping[str, Part]) -> tuple[bool, dict[str, float], dict[str, Part]]:
    """Whether the parts are rslora's, their alphas, and the parts with the scales those give.

    They are rslora's where alpha / √rank, and not alpha / rank, has whole alphas for all. A scale
    that no alpha / rank gives back to the bit is put into b.
    """
    roots = {name: round(part.scale * math.sqrt(part.rank)) for name, part in parts.items()}
    plain = {name: part.scale * part.rank for name, part in parts.items()}
    whole = all(alpha == int(alpha) for alpha in plain.values())
    same = (alpha / math.sqrt(parts[n].rank) == parts[n].scale for n, alpha in roots.items())
    if not whole and all(same):
        return True, dict(roots), dict(parts)
    folded = {
        name: part if plain[name] / part.rank == part.scale else _folded(part)
        for name, part in parts.items()
    }
    return False, {name: part.scale * part.rank for name, part in folded.items()}, folded


def _folded(part: Part) -> Part:
    """The same module with its scale in b."""
    tensors = {r: np.float32(part.scale) * t if "_B" in r else t for r, t in part.tensors.items()}
    return replace(part, tensors=tensors, scale=1.0)

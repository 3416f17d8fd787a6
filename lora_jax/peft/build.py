"""An adapter's modules out of the tensors of its layers, as a file has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.modules import IA3, DoRA, LoRA, Module
from lora_jax.peft.names import BIAS, MAGNITUDE, Slot

Tensors = Mapping[str, np.ndarray]  # one module's, by role


def modules(
    slots: Mapping[str, Slot], stored: Mapping[str, Tensors], scales: Mapping[str, float]
) -> dict[str, Module]:
    """The modules by path: their layers stacked, and where one has none, the identity.

    `stored` has each module's tensors by role, `scales` each LoRA's alpha / rank.
    """
    paths: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in slots.items():
        paths.setdefault(slot.path, []).append((name, slot))
    table = {}
    for path, places in paths.items():
        layers = [stored.get(name) for name, _ in places]
        if any(layer is not None for layer in layers):
            size, is_ia3 = places[0][1].size, any("ia3_l" in (layer or {}) for layer in layers)
            factors = [scales.get(name, 1.0) for name, _ in places]
            module = _ia3(layers, size) if is_ia3 else _lora(layers, size, factors)
            table[path] = module if places[0][1].stacked else _unstacked(module)
    return table


def _lora(
    layers: Sequence[Tensors | None], size: tuple[int, int], scales: Sequence[float]
) -> Module:
    """A LoRA or DoRA: ragged ranks padded with zeros, unequal scales folded into b and bias."""
    present = [(t, s) for t, s in zip(layers, scales, strict=True) if t is not None]
    alike = len({s for _, s in present}) == 1
    scale = present[0][1] if alike else 1.0
    rank = max(len(t["lora_A"]) for t, _ in present)
    a = np.zeros((len(layers), size[0], rank), np.float32)
    b = np.zeros((len(layers), rank, size[1]), np.float32)
    rows = np.zeros((len(layers), size[1]), np.float32)
    role = next((r for r in (MAGNITUDE, BIAS) if r in present[0][0]), "")
    for n, (tensors, own) in enumerate(zip(layers, scales, strict=True)):
        if tensors is not None:
            fold, used = 1.0 if alike else own, len(tensors["lora_A"])
            a[n, :, :used] = tensors["lora_A"].T
            b[n, :used] = fold * tensors["lora_B"].T
            if role:
                rows[n] = tensors[role] * (fold if role == BIAS else 1.0)
    factors = jnp.asarray(a), jnp.asarray(b)
    if role == MAGNITUDE:
        return DoRA(*factors, jnp.asarray(rows), scale)
    return LoRA(*factors, scale, jnp.asarray(rows) if role else None)


def _ia3(layers: Sequence[Tensors | None], size: tuple[int, int]) -> IA3:
    """An IA3: a stored l becomes the offset l - 1; l is a row where it rescales the input."""
    on_input = any(t is not None and t["ia3_l"].shape[0] == 1 for t in layers)
    offsets = np.zeros((len(layers), size[0] if on_input else size[1]), np.float32)
    for n, tensors in enumerate(layers):
        if tensors is not None:
            offsets[n] = tensors["ia3_l"].reshape(-1) - 1
    return IA3(jnp.asarray(offsets), "input" if on_input else "output")


def _unstacked(module: Any) -> Any:
    """A module of what the model has just once: without the layer axis."""
    fields = {key: value[0] for key, value in vars(module).items() if hasattr(value, "ndim")}
    return module.replace(**fields)

"""A module merged into the base's kernels, and subtracted from them again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, LoRA, Module


def merge(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Base weights that compute alone what base and adapter compute together.

    LoRA adds scale·a·b to its kernel; IA3 multiplies the kernel's columns (and the bias), or its
    rows, by 1 + offset. Tokens routed between experts have no single kernel and are refused.
    """
    return _change(weights, adapter, 1)


def unmerge(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The inverse of `merge`, up to rounding; an IA3 offset of -1 has none."""
    return _change(weights, adapter, -1)


def _change(weights: Mapping[str, Any], adapter: Adapter, sign: int) -> dict[str, Any]:
    layers = dict(weights["layers"])
    lost = [path for path in adapter if path not in layers]
    if lost:
        raise InputError(f"this model has no projection {', '.join(lost)} for a module")
    for path, module in adapter.items():
        bias = layers.get(f"{path}.bias")
        layers[path], bias = _changed(path, layers[path], bias, module, sign)
        if bias is not None:
            layers[f"{path}.bias"] = bias
    return {**weights, "layers": layers}


def _changed(path: str, kernel: Any, bias: Any, module: Module, sign: int) -> tuple[Any, Any]:
    """A kernel (N, I, O) and bias (N, O) after one module is put in or taken out."""
    match module:
        case LoRA(a, b, scale):
            delta = jnp.einsum("NIR,NRO->NIO", a, b) * (sign * scale)
            return (kernel + delta).astype(kernel.dtype), bias
        case IA3(offset, on):
            factor = (1 + offset) ** sign
            if on == "input":
                return (kernel * factor[:, :, None]).astype(kernel.dtype), bias
            scaled = (kernel * factor[:, None, :]).astype(kernel.dtype)
            return scaled, None if bias is None else (bias * factor).astype(bias.dtype)
    raise InputError(f"{path}: {type(module).__name__} cannot be merged into one kernel")

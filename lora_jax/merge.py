"""A module merged into the base's kernels, and subtracted from them again."""

from collections.abc import Mapping
from typing import Any

from lora_jax.decoder import where, with_saved
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, LoRA, Module, Saved
from lora_jax.table import flatten, nest


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
    if sign < 0 and any(isinstance(module, Saved) for module in adapter.values()):
        raise InputError("a weight that an adapter replaced cannot be subtracted again")
    weights, adapter = with_saved(weights, adapter)
    flat = flatten(weights)
    changed = {}
    for path, module in adapter.items():
        stack, name = where(weights, path)
        key = f"{stack}.{name}" if stack else name
        if path == "unembed" and key not in flat:
            flat[key] = flat["embed"].T  # no longer tied
        if key not in flat:
            raise InputError(f"this model has no projection {path} for a module")
        bias = flat.get(f"{key}.bias")
        changed[key], bias = _changed(path, flat[key], bias, module, sign)
        if bias is not None:
            changed[f"{key}.bias"] = bias
    return nest(flat | changed)


def _changed(path: str, kernel: Any, bias: Any, module: Module, sign: int) -> tuple[Any, Any]:
    """A kernel (..., I, O) and bias (..., O) after one module is put in or taken out."""
    match module:
        case LoRA(a, b, scale):
            delta = (a @ b) * (sign * scale)
            return (kernel + delta).astype(kernel.dtype), bias
        case IA3(offset, on):
            factor = (1 + offset) ** sign
            if on == "input":
                return (kernel * factor[..., :, None]).astype(kernel.dtype), bias
            scaled = (kernel * factor[..., None, :]).astype(kernel.dtype)
            return scaled, None if bias is None else (bias * factor).astype(bias.dtype)
    raise InputError(f"{path}: {type(module).__name__} cannot be merged into one kernel")

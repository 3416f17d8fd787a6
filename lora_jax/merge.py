"""A module merged into the base's kernels, and subtracted from them again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.decoder import where, with_saved
from lora_jax.dora import gain
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, DoRA, LoRA, Module, Saved
from lora_jax.quantize import refuse_quantized
from lora_jax.table import flatten, nest


def merge(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Base weights that compute alone what base and adapter compute together.

    LoRA adds scale·a·b to its kernel, and scale·bias to its bias; DoRA rescales the columns of that
    sum; IA3 multiplies the kernel's columns (and the bias), or its rows, by 1 + offset. Tokens
    routed between experts have no single kernel and are refused. An adapter that changes the
    embedding or the unembedding of a base where they are one unties them.
    """
    refuse_quantized(weights, "a module cannot be merged")
    weights = untied(weights) if {"embed", "unembed"} & adapter.keys() else weights
    weights, adapter = with_saved(weights, adapter)
    flat = flatten(weights)
    changed = {}
    for path, module in adapter.items():
        key = _key(weights, path)
        if key not in flat:
            raise InputError(f"this model has no projection {path} for a module")
        changed[key], bias = changed_by(path, module, flat[key], flat.get(f"{key}.bias"))
        if bias is not None and f"{key}.bias" not in flat:
            raise InputError(f"{path}: its lora_bias has no bias in the base to merge into")
        changed |= {} if bias is None else {f"{key}.bias": bias}
    return nest(flat | changed)


def unmerge(weights: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The inverse of `merge`, up to rounding; an IA3 offset of -1 has none, nor has DoRA."""
    problems = [f"{path} ({type(m).__name__})" for path, m in adapter.items() if _is_final(m)]
    if problems:
        raise InputError(f"nothing can take {', '.join(problems)} out of a base again; keep it")
    return merge(weights, {path: _inverse(module) for path, module in adapter.items()})


def untied(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights with an unembedding of their own."""
    return weights if "unembed" in weights else {**weights, "unembed": weights["embed"].T}


def changed_by(path: str, module: Module, kernel: Any, bias: Any = None) -> tuple[Any, Any]:
    """A kernel (..., I, O) and bias (..., O) after one module is put in, in the kernel's type."""
    match module:
        case LoRA():
            if module.bias is not None:
                bias = module.scale * module.bias + (0 if bias is None else bias)
                bias = bias.astype(kernel.dtype)
            return (kernel + _delta(module)).astype(kernel.dtype), bias
        case DoRA():
            columns = gain(kernel, module)[..., None, :]
            return (columns * (kernel + _delta(module))).astype(kernel.dtype), bias
        case IA3(offset, "input"):
            return (kernel * (1 + offset)[..., :, None]).astype(kernel.dtype), bias
        case IA3(offset):
            scaled = (kernel * (1 + offset)[..., None, :]).astype(kernel.dtype)
            return scaled, None if bias is None else (bias * (1 + offset)).astype(kernel.dtype)
    raise InputError(f"{path}: {type(module).__name__} cannot be merged into one kernel")


def _delta(module: LoRA | DoRA) -> jax.Array:
    """What the factors add to a kernel (..., I, O), in full precision on every device."""
    return module.scale * jnp.matmul(module.a, module.b, precision="highest")


def _key(weights: Mapping[str, Any], path: str) -> str:
    """The path of a module's kernel among flat weights."""
    stack, name = where(weights, path)
    return f"{stack}.{name}" if stack else name


def _is_final(module: Module) -> bool:
    """Whether merging a module forgets what the base had."""
    return isinstance(module, DoRA | Saved)


def _inverse(module: Module) -> Module:
    """The module that undoes another."""
    match module:
        case LoRA():
            return replace(module, scale=-module.scale)
        case IA3(offset):
            return replace(module, offset=1 / (1 + offset) - 1)
    return module

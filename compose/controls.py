"""The controls that tell an effect from an artefact: modules that know nothing, of the same shape.

GenKnowSub (2505.10939) subtracts factor by factor modules that share their initialisation, so what
it takes away may be that initialisation, or size alone. Its effect is one of knowledge only where
these do not have it too.
"""

import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.align import by_projection
from compose.arithmetic import refuse_sum
from compose.lowrank import norm
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, LoRA, Module, Saved, init_lora

Array = jax.Array


def untrained(adapter: Adapter, seed: int) -> Adapter:
    """The module as `lora-train --init-seed` makes it before its first step; it changes nothing.

    Its factors are a's first draw and zeros: in factor space, subtracting it takes away the
    initialisation that modules of one seed share, and nothing else.
    """
    return {path: _untrained(path, module, seed) for path, module in adapter.items()}


def _untrained(path: str, module: Module, seed: int) -> Module:
    match module:
        case LoRA(a=a, b=b):
            rank, shapes = a.shape[-1], {path: (*a.shape[:-1], b.shape[-1])}
            options: dict[str, Any] = {"targets": [path], "rank": rank}
            options["alpha"] = module.scale * rank
            return init_lora(jax.random.key(seed), shapes, **options)[path]
        case IA3(offset=offset):
            return replace(module, offset=jnp.zeros_like(offset))
    raise InputError(f"{path}: there is no untrained {type(module).__name__} to compare with")


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """A random module, at every projection and layer as large as this one in what it adds.

    Its factors are normal, each as large as the one it stands for, so that it is as large in factor
    space too.
    """
    key = jax.random.key(seed)
    return {
        path: _random(path, module, jax.random.fold_in(key, zlib.crc32(path.encode())))
        for path, module in adapter.items()
    }


def _random(path: str, module: Module, key: Array) -> Module:
    match module:
        case LoRA(a=a, b=b):
            keys = jax.random.split(key)
            drawn = replace(module, a=_as_large(keys[0], a, 2), b=_as_large(keys[1], b, 2))
            return _sized(drawn, norm(module))
        case IA3(offset=offset):
            return replace(module, offset=_as_large(key, offset, 1))
    raise InputError(f"{path}: there is no random {type(module).__name__} of the same size")


def _as_large(key: Array, x: Array, axes: int) -> Array:
    """A normal tensor with x's norm over its last `axes` axes."""
    drawn, over = jax.random.normal(key, x.shape, jnp.float32), tuple(range(-axes, 0))
    sizes = (jnp.sqrt(jnp.sum(jnp.square(t), axis=over, keepdims=True)) for t in (x, drawn))
    wanted, found = sizes
    return (drawn * wanted / found).astype(x.dtype)


def rescaled(adapter: Adapter, like: Adapter) -> Adapter:
    """The module with what it adds made as large as what `like` adds, projection and layer alike.

    A projection that `like` leaves alone is left as it is.
    """
    pairs = {path: (adapter[path], like.get(path)) for path in adapter}
    by_projection([adapter, like])  # refuses modules that do not fit together
    return {
        path: m if other is None else _resized(path, m, other) for path, (m, other) in pairs.items()
    }


def _resized(path: str, module: Module, like: Module) -> Module:
    match module, like:
        case LoRA(), LoRA():
            refuse_sum(path, module)
            return _sized(module, norm(like))
        case IA3(offset=offset), IA3(offset=other):
            sizes = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (other, offset))
            wanted, found = sizes
            return replace(module, offset=offset * wanted / jnp.where(found > 0, found, 1))
        case Saved(), Saved():
            return module
    raise InputError(f"{path}: a {type(module).__name__} has no size to be given")


def _sized(module: LoRA, wanted: Array) -> LoRA:
    """The module with the norm of its delta (...) as wanted, both factors having their share."""
    found = norm(module)
    share = jnp.sqrt(wanted / jnp.where(found > 0, found, 1))[..., None, None]
    return replace(
        module,
        a=(share * module.a).astype(module.a.dtype),
        b=(share * module.b).astype(module.b.dtype),
    )

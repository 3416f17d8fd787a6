"""How large whole modules are, how alike, and how few ranks hold them."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from compose import lowrank
from compose.align import by_projection
from compose.library import Library
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, DoRA, LoRA, Module, Saved

Array = jax.Array


def norm(adapter: Adapter) -> Array:
    """The Frobenius norm () of everything a module adds: LoRA's deltas and IA3's offsets.

    Weights kept whole are left out, here and below: how far they are from the base's it alone says.
    """
    squares = [jnp.sum(_size(path, module) ** 2) for path, module in adapter.items()]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def _size(path: str, module: Module) -> Array:
    """The norm of what a module adds, by layer."""
    match module:
        case LoRA():
            return lowrank.norm(module)
        case IA3(offset=offset):
            return jnp.linalg.norm(offset, axis=-1)
        case Saved():
            return jnp.zeros(())
        case DoRA():
            raise InputError(f"{path}: what a DoRA adds depends on the base; it has no norm alone")
    raise InputError(f"{path}: routed experts have no single delta; measure the library's modules")


def inner(x: Adapter, y: Adapter) -> Array:
    """The inner product () of what two modules add, over the projections that both change."""
    pairs = by_projection([x, y]).values()
    return sum((jnp.sum(_inner(*pair)) for pair in pairs), jnp.zeros(()))


def _inner(x: Module | None, y: Module | None) -> Array:
    """The inner product of what two modules add, by layer; 0 where one is missing."""
    match x, y:
        case LoRA(), LoRA():
            return lowrank.inner(x, y)
        case IA3(), IA3():
            return jnp.sum(x.offset * y.offset, axis=-1)
        case (None, _) | (_, None) | (Saved(), Saved()):
            return jnp.zeros(())
    if isinstance(x, DoRA):
        raise InputError("what a DoRA adds depends on the base; it has no inner product")
    raise InputError("routed experts have no inner product; measure the library's modules")


def cosine(x: Adapter, y: Adapter) -> Array:
    """The cosine () between what two modules add; 0 if either adds nothing."""
    lengths = norm(x) * norm(y)
    return inner(x, y) / jnp.where(lengths > 0, lengths, 1)


def recompress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Array]]:
    """The module at `rank` or less, and each LoRA projection's relative error (N,)."""
    pairs = {
        path: lowrank.recompress(module, rank)
        for path, module in adapter.items()
        if isinstance(module, LoRA)
    }
    small = {path: pairs[path][0] if path in pairs else m for path, m in adapter.items()}
    return small, {path: error for path, (_, error) in pairs.items()}


def recompress_members(
    value: Adapter | Library, rank: int
) -> tuple[Adapter | Library, dict[str, dict[str, Array]]]:
    """A module or every module of a library at `rank` or less, and the errors by member's name.

    A lone module is the member "".
    """
    if not isinstance(value, Library):
        small, errors = recompress(value, rank)
        return small, {"": errors}
    pairs = [recompress(member, rank) for member in value.adapters]
    small = replace(value, adapters=tuple(member for member, _ in pairs))
    return small, {name: errors for name, (_, errors) in zip(value.names, pairs, strict=True)}

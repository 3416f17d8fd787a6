"""The modules of one projection at one layer, as the entrywise methods of merging see them.

Members are an array (M, *S), or a LoRA whose leaves have the axis M in front and whose tensors are
dense deltas (I, O). Those of all members are never held at once: `each` takes one member after
another, `joined` and `summed` a block of rows or columns of all.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.decompositions import wide
from lora_jax.modules import LoRA

Array = jax.Array
Members = Array | LoRA
BLOCK = 2**20  # entries of all members that are held at once: few enough to stay in the cache


def tensor_of(member: Members) -> Array:
    """A member's tensor (*S), or all members' (M, *S), in float32 at least."""
    if not isinstance(member, LoRA):
        return wide(member)
    with jax.default_matmul_precision("highest"):
        if member.a.ndim > 2:  # one after another: XLA's batched product is slow on a CPU
            return jax.lax.map(tensor_of, member)
        return member.scale * (wide(member.a) @ wide(member.b))


def weighted(xs: Array, weights: Array) -> Array:
    """Σ wᵢxᵢ (*S) of stacked tensors (M, *S); XLA has a fast product on a CPU, and no such sum."""
    with jax.default_matmul_precision("highest"):
        return (weights.astype(xs.dtype) @ xs.reshape(len(xs), -1)).reshape(xs.shape[1:])


def total(xs: Array) -> Array:
    """Σ xᵢ (*S) of stacked tensors (M, *S), or how many are true, in float32 at least."""
    xs = wide(xs)
    return weighted(xs, jnp.ones(len(xs), xs.dtype))


def per_member(numbers: Array, xs: Array) -> Array:
    """Numbers (M,) in a shape that meets stacked tensors (M, *S)."""
    return numbers.reshape(-1, *[1] * (xs.ndim - 1))


def size_of(members: Members) -> int:
    """How many entries one member's tensor has."""
    if isinstance(members, LoRA):
        return members.a.shape[-2] * members.b.shape[-1]
    return members[0].size


def each(function: Callable[[Array], Any], members: Members) -> Any:
    """`function` of every member's tensor, one after another; its results along the axis M."""
    return jax.lax.map(lambda member: function(tensor_of(member)), members)


def joined(
    formula: Callable[..., Array],
    *stacks: Any,
    key: Array | None = None,
    columns: bool = False,
) -> Array:
    """`formula` (*S) of the stacked tensors (M, *S); of LoRA's deltas, row block by row block.

    With `columns`, by blocks of whole columns. If there is a `key`, a block's own goes to the
    formula after the tensors.
    """
    if not isinstance(stacks[0], LoRA):
        return formula(*map(tensor_of, stacks), *_own(key, 0))
    rows, width = stacks[0].a.shape[-2], stacks[0].b.shape[-1]
    found = _by_block(formula, stacks, key, columns)
    if columns:
        return jnp.moveaxis(found, 0, 1).reshape(rows, -1)[:, :width]
    return found.reshape(-1, width)[:rows]


def summed(
    formula: Callable[..., Array],
    *stacks: Any,
    key: Array | None = None,
    columns: bool = False,
) -> Array:
    """The sum over blocks of what `formula` gives of each, the blocks and keys being `joined`'s."""
    if not isinstance(stacks[0], LoRA):
        return formula(*map(tensor_of, stacks), *_own(key, 0))
    return jnp.sum(_by_block(formula, stacks, key, columns), axis=0)


def _own(key: Array | None, number: Array | int) -> tuple[Array, ...]:
    """A block's own key, if there is one."""
    return () if key is None else (jax.random.fold_in(key, number),)


def _by_block(
    formula: Callable[..., Array], stacks: tuple[Any, ...], key: Array | None, columns: bool
) -> Array:
    """`formula` of every block, along a new axis in front."""
    length = stacks[0].b.shape[-1] if columns else stacks[0].a.shape[-2]
    entries = sum(len(stack.a) * size_of(stack) for stack in stacks)
    count = min(length, -(-entries // BLOCK))
    parts = [_cut(stack.b if columns else stack.a.mT, count) for stack in stacks]

    def one(block: tuple[Array, list[Array]]) -> Array:
        """The formula of one block."""
        number, cut = block
        pairs = zip(stacks, cut, strict=True)
        whole = [replace(s, b=c) if columns else replace(s, a=c.mT) for s, c in pairs]
        return formula(*map(tensor_of, whole), *_own(key, number))

    return jax.lax.map(one, (jnp.arange(count), parts))


def _cut(x: Array, count: int) -> Array:
    """The last axis of x (M, R, L) in `count` equal parts (count, M, R, L'), zeros at its end."""
    length = -(-x.shape[-1] // count)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, length * count - x.shape[-1])])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], count, length), -2, 0)

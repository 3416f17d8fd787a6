"""Frozen kernels held in few bits, and given back where they are used.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", section 3: blocks of 64 numbers,
each divided by its largest magnitude, each number then the nearest of a few levels.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.errors import InputError
from lora_jax.table import flatten, nest

Array = jax.Array
KINDS = ("int8", "nf4")
BLOCK = 64

# The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1], zero among them
# (QLoRA, appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@struct.dataclass
class Quantized:
    """A kernel (..., I, O) as a code for each number and a scale for each block along its input.

    "int8" holds a number as 127ths of its block's largest magnitude in a byte, "nf4" as one of
    `LEVELS` in half a byte, the earlier of two in the high half: bitsandbytes' blocks and order,
    for kernels whose inputs are a multiple of 64.
    """

    codes: Array  # (..., I, O) int8, or (..., I / 2, O) uint8; I filled up to whole blocks
    scales: Array  # (..., I / 64, O) float32
    kind: str = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)  # I


@partial(jax.jit, static_argnames="kind")
def quantized(kernel: Array, kind: str) -> Quantized:
    """A kernel (..., I, O) held in "int8" (8.5 bits a number) or "nf4" (4.5 bits)."""
    if kind not in KINDS:
        raise InputError(f"unknown quantization {kind!r}; choose {' or '.join(KINDS)}")
    *lead, size, out = kernel.shape
    filling = [(0, 0)] * len(lead) + [(0, -size % BLOCK), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), filling).reshape(*lead, -1, BLOCK, out)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    unit = blocks / jnp.where(scales > 0, scales, 1)[..., None, :]
    codes = (_nearest(unit) if kind == "nf4" else jnp.round(127 * unit).astype(jnp.int8)).reshape(
        *lead, -1, out
    )
    if kind == "nf4":
        codes = codes[..., 0::2, :] << 4 | codes[..., 1::2, :]
    return Quantized(codes, scales, kind, size)


def _nearest(unit: Array) -> Array:
    """The number, 0 to 15, of the level nearest to each number."""
    middles = (np.asarray(LEVELS[:-1]) + np.asarray(LEVELS[1:])) / 2
    found = jnp.zeros(unit.shape, jnp.uint8)
    for middle in middles:
        found += (unit > np.float32(middle)).astype(jnp.uint8)
    return found


def dense(kernel: Any, dtype: Any) -> Array:
    """A kernel (..., I, O) as numbers of `dtype`; one that is not quantized is given back as is."""
    if not isinstance(kernel, Quantized):
        return kernel
    codes, scales = kernel.codes, kernel.scales
    if kernel.kind == "nf4":
        codes = jnp.stack([codes >> 4, codes & 15], axis=-2)
        unit = jnp.asarray(LEVELS, jnp.float32)[codes]
    else:
        unit = codes.astype(jnp.float32) / 127
    blocks = unit.reshape(*scales.shape[:-1], BLOCK, scales.shape[-1]) * scales[..., None, :]
    whole = blocks.reshape(*scales.shape[:-2], -1, scales.shape[-1])
    return whole[..., : kernel.size, :].astype(dtype)


def dequantized(weights: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """The weights with every quantized kernel as numbers again: what a merge needs."""
    return nest({path: dense(value, dtype) for path, value in flatten(weights).items()})


def refuse_quantized(weights: Mapping[str, Any], purpose: str) -> None:
    """Refuses weights with quantized kernels for what would lose by them."""
    held = {value.kind for value in flatten(weights).values() if isinstance(value, Quantized)}
    if held:
        raise InputError(
            f"{purpose}: the base is held in {', '.join(held)}; load it without --quantize, or "
            f"give quantize.dequantized(weights)"
        )


def stored_bytes(weights: Mapping[str, Any]) -> int:
    """The bytes that weights take in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(dict(weights)))


def place(kernel: Quantized, sharding: NamedSharding | None) -> Quantized:
    """A quantized kernel laid out as its dense one would be; whole where a cut is uneven."""
    if sharding is None:
        return jax.tree.map(jax.device_put, kernel)
    mesh, spec = sharding.mesh, tuple(sharding.spec)

    def put(x: Array) -> Array:
        cuts = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, x.shape, strict=True)
        ]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*cuts)))

    return jax.tree.map(put, kernel)

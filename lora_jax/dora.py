"""DoRA's arithmetic: the norms of a changed kernel's columns, and what rescales them.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.modules import DoRA, LoRA
from lora_jax.quantize import dense
from lora_jax.table import flatten


def gain(kernel: jax.Array, module: DoRA) -> jax.Array:
    """What each output is multiplied by (..., O): its magnitude over its changed column's norm.

    No gradient passes through the norm, which is the paper's section 4.3 and what PEFT does.
    """
    held = jax.lax.stop_gradient((kernel, module.a, module.b))
    norms = column_norms(*held, module.scale)
    scaled = module.magnitude / jnp.where(norms > 0, norms, 1)
    return jnp.where(module.magnitude == 0, 1, scaled)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The norms (..., O) of the columns of kernel + scale·a·b, in float32, that sum never formed.

    |w + s·a·b|² = |w|² + 2s (aᵀw)·b + s² b·(aᵀa)b, column by column.
    """
    wide, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    with jax.default_matmul_precision("highest"):
        met = jnp.einsum("...IR,...IO->...RO", a, wide)
        own = jnp.einsum("...IR,...IS->...RS", a, a) @ b
    squares = jnp.sum(wide * wide, axis=-2) + jnp.sum(b * scale * (2 * met + scale * own), axis=-2)
    return jnp.sqrt(jnp.maximum(squares, 0))


def with_magnitudes(adapter: Mapping[str, LoRA], weights: Mapping[str, Any]) -> dict[str, DoRA]:
    """A new LoRA made a DoRA on a base's weights: magnitudes are the norms that it finds."""
    flat = flatten(weights)

    def one(path: str, module: LoRA) -> DoRA:
        """A LoRA of the projection at a path with the magnitudes that it finds there."""
        if module.bias is not None:
            raise InputError(f"{path}: DoRA has no lora_bias; train without one of them")
        kernel = dense(flat[path] if path in flat else flat[f"layers.{path}"], jnp.float32)
        norms = column_norms(kernel, module.a, module.b, module.scale)
        return DoRA(module.a, module.b, norms, module.scale)

    return {path: one(path, module) for path, module in adapter.items()}

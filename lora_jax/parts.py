"""What the model families share: norms, rotary positions, attention masks, the key-value cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x (..., D) over its root mean square, times a gain; the mean is taken in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * gain


def layer_norm(x: Array, gain: Array, bias: Array, eps: float) -> Array:
    """x (..., D) less its mean, over its deviation, times a gain, plus a bias; in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * gain + bias


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """x (B, T, heads, C) rotated by its position, in halves, as Hugging Face stores it.

    Tables (of `rope.tables`) narrower than C / 2 turn a head's first numbers and leave the rest.
    """
    cos, sin = tables
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    left, right = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@struct.dataclass
class Cache:
    """Keys and values of the positions already seen, in slots filled from the left.

    A slot whose segment is 0 holds padding and is never attended to, so rows of unequal length
    share a cache, and generated tokens follow in the slots after the longest row.
    """

    keys: Array  # (N, B, S, K, C)
    values: Array  # (N, B, S, K, C)
    segments: Array  # (B, S)
    positions: Array  # (B, S)
    used: Array  # (), slots filled


def empty_cache(
    layers: int, batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype
) -> Cache:
    """A cache of `slots` slots for `batch` rows, holding nothing."""
    pages = jnp.zeros((layers, batch, slots, heads, width), dtype)
    index = jnp.zeros((batch, slots), jnp.int32)
    return Cache(pages, pages, index, index, jnp.zeros((), jnp.int32))


@struct.dataclass
class Memory:
    """What a decoder attends to beside itself: its keys and values of a source, made once."""

    keys: Array  # (N, B, S, K, C)
    values: Array  # (N, B, S, K, C)
    segments: Array  # (B, S), seen by the decoder's equal ones; 0 is padding, negative seen by all
    observed: Any = None  # what `observe` returned while it was made, by projection


def put(pages: Array, new: Array, used: Array | int) -> Array:
    """`pages` (B, S, ...) with `new` (B, T, ...) in the T slots from `used` on."""
    start = (0, used) + (0,) * (pages.ndim - 2)
    return jax.lax.dynamic_update_slice(pages, new.astype(pages.dtype), start)


def attention_mask(
    segments: Array,
    positions: Array,
    key_segments: Array,
    key_positions: Array,
    used: Array | int = 0,
    window: int | None = None,
) -> Array:
    """Which key (B, 1, T, S) each query may see: earlier, of its own segment, within the window.

    "Earlier" goes by slot: query t sits in slot used + t. Segment 0 is padding; a negative segment
    is seen by every later one, so that several continuations can share a prefix.
    """
    slots = used + jnp.arange(segments.shape[1])
    earlier = slots[:, None] >= jnp.arange(key_segments.shape[1])
    same = segments[:, :, None] == key_segments[:, None, :]
    shared = key_segments[:, None, :] < 0
    mask = earlier & ((same & (key_segments[:, None, :] > 0)) | shared)
    if window is not None:
        mask &= positions[:, :, None] - key_positions[:, None, :] < window
    return mask[:, None]


def whole_mask(segments: Array, key_segments: Array) -> Array:
    """Which key (B, 1, T, S) each query may see, before it or after: those of its own segment.

    Segment 0 is padding; a negative segment is seen by every query.
    """
    same = segments[:, :, None] == key_segments[:, None, :]
    shared = key_segments[:, None, :] < 0
    return ((same & (key_segments[:, None, :] > 0)) | shared)[:, None]


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    *,
    scale: float | None = None,
    bias: Array | None = None,
) -> Array:
    """Grouped-query attention: q (B, T, H, C) over k and v (B, S, K, C); softmax in float32.

    Logits are q·k times `scale` (1 / sqrt(C) by default) plus `bias` (B or 1, H, T, S).
    """
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)

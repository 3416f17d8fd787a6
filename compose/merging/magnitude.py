"""Which magnitude the largest entries of a big tensor reach, exactly, by passes that only count.

Magnitudes as float32 bits are integers in the same order, so the one sought lies between two
integers; each pass counts the entries above three between them, two of them where interpolation
expects it. A sort or `top_k` of the tensor costs XLA a hundred times as much on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
SAMPLE = 2**10  # entries that are sorted to begin with
ROWS, COLUMNS = 16, 2**12  # entries counted at a time: their comparisons stay in the cache
SPREAD = 1.5  # standard deviations between the expected place and the pivots beside it
DIGITS = 10  # bits of an integer that one pivot's count takes


@struct.dataclass
class Share:
    """A share of a tensor's entries, traced, and how many they are: counted in full precision."""

    value: Array
    count: Array


Density = float | Array | Share


def share_of(density: float, size: int) -> Share:
    """A known share of `size` entries as arrays, so that another one compiles nothing anew."""
    return Share(jnp.float32(density), jnp.int32(kept(density, size)))


def value_of(density: Density) -> float | Array:
    """The share itself."""
    return density.value if isinstance(density, Share) else density


def kept(density: Density, size: int) -> int | Array:
    """How many of `size` entries a density keeps, rounded down; all from a density of 1 on.

    An array's product is rounded to float32, and may be one more or less than a number's.
    """
    if isinstance(density, Share):
        return density.count
    if isinstance(density, float | int):
        return min(int(density * size), size)
    return jnp.clip(jnp.floor(density * size).astype(jnp.int32), 0, size)


def floor(x: Array, k: int | Array) -> Array:
    """A magnitude () in float32 that the k largest of |x| reach and no others; infinite for k = 0.

    Others do reach it where they equal the k-th. No gradient passes.
    """
    size = x.size
    bits = _bits(jax.lax.stop_gradient(x))
    if size <= SAMPLE:
        found = jnp.sort(bits)[size - jnp.maximum(k, 1)]
    else:
        found = _search(bits, jnp.asarray(k, jnp.int32))
    return jnp.where(k > 0, jax.lax.bitcast_convert_type(found, jnp.float32), jnp.inf)


def _bits(x: Array) -> Array:
    """|x|, flat, as integers in the same order."""
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32).ravel()


def _search(bits: Array, k: Array) -> Array:
    """An integer that k of `bits` reach, or the largest that at least k do.

    The state is (low, high, how many reach low, how many reach high): at least k, fewer than k.
    """
    size = len(bits)
    blocks = _blocks(bits)

    def narrowed(state: tuple[Array, ...]) -> tuple[Array, ...]:
        """The state after a pass over three pivots."""
        low, high, above_low, above_high = state
        inside = (above_low - above_high).astype(jnp.float32)
        width = (high - low).astype(jnp.float32)
        place = width * (above_low - k).astype(jnp.float32) / inside
        spread = jnp.maximum(width * SPREAD / jnp.sqrt(inside), 1)
        steps = jnp.stack([place - spread, place + spread, width / 2]).astype(jnp.int32)
        return _between(blocks, k, state, jnp.clip(low + steps, low + 1, high - 1))

    def open_(state: tuple[Array, ...]) -> Array:
        """Whether the integer sought is still not known."""
        low, high, above_low, _ = state
        return (above_low > k) & (high - low > 1)

    top = jnp.int32(np.float32(np.inf).view(np.int32) + 1)
    start = (jnp.int32(0), top, jnp.int32(size), jnp.int32(0))
    state = _between(blocks, k, start, _sampled(bits, k))
    return jax.lax.while_loop(open_, narrowed, state)[0]


def _sampled(bits: Array, k: Array) -> Array:
    """Three pivots about the place sought, judging by some of the entries."""
    sample = jnp.sort(bits[:: len(bits) // SAMPLE][:SAMPLE])
    place = SAMPLE - jnp.int32(SAMPLE * (k / len(bits)))
    error = int(2 * SPREAD * SAMPLE**0.5 / 2)
    return sample[jnp.clip(place + jnp.array([-error, 0, error]), 0, SAMPLE - 1)]


def _between(blocks: Array, k: Array, state: tuple[Array, ...], pivots: Array) -> tuple[Array, ...]:
    """The state with its ends moved to the nearest pivots on either side of the integer sought."""
    low, high, above_low, above_high = state
    above = _reached(blocks, pivots)
    enough = above >= k
    up = jnp.max(jnp.where(enough, pivots, low))
    down = jnp.min(jnp.where(enough, high, pivots))
    fewest = jnp.min(jnp.where(enough, above, above_low))
    return up, down, fewest, jnp.max(jnp.where(enough, above_high, above))


def _blocks(bits: Array) -> Array:
    """The integers as (blocks, ROWS, COLUMNS), -1 where there are no more."""
    size = ROWS * COLUMNS
    padded = jnp.pad(bits, (0, -len(bits) % size), constant_values=-1)
    return padded.reshape(-1, ROWS, COLUMNS)


def _reached(blocks: Array, pivots: Array) -> Array:
    """How many integers reach each of the pivots (P,), counted side by side in one integer."""
    shifts = DIGITS * np.arange(len(pivots))

    def one(block: Array) -> Array:
        """The counts (P,) of one block."""
        reach = (jnp.int32(block >= p) << s for p, s in zip(pivots, shifts, strict=True))
        packed = jnp.sum(sum(reach, jnp.int32(0)), axis=0)
        return jnp.sum((packed[:, None] >> shifts) & (2**DIGITS - 1), axis=0)

    return jnp.sum(jax.lax.map(one, blocks), axis=0)

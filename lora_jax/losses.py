"""The negative log-likelihood of tokens, and a way to have few logits at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The negative log-likelihoods (...), in nats, of `targets` (...) under `logits` (..., V).

    The second part is the log of the normaliser (...). Nothing is cast: logits should be float32.
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return total - picked, total


def in_chunks(
    function: Callable[..., Any], arrays: Sequence[Array], size: int, axis: int = 0
) -> Any:
    """`function` of the arrays in chunks of at most `size` along an axis, one after the other.

    Its results, too, must have that axis; each place in them may depend on its own place alone.
    """
    count = arrays[0].shape[axis]
    size = min(size, count)
    chunks = -(-count // size)

    def split(x: Array) -> Array:
        filling = [(0, chunks * size - count if n == axis else 0) for n in range(x.ndim)]
        shape = (*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, filling).reshape(shape), axis, 0)

    def join(x: Array) -> Array:
        whole = jax.lax.collapse(jnp.moveaxis(x, 0, axis), axis, axis + 2)
        return jax.lax.slice_in_dim(whole, 0, count, axis=axis)

    out = jax.lax.map(lambda chunk: function(*chunk), tuple(map(split, arrays)))
    return jax.tree.map(join, out)

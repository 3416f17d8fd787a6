"""Multiple choice by log-likelihood: one pure function from a batch of questions to scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from eval.likelihood import token_nll
from lora_jax import models
from lora_jax.modules import Adapter

Array = jax.Array
Rows = jax.Array | np.ndarray  # on a device, or still on the host
SCORES = ("answer_mean", "text_mean", "sum", "char")


@struct.dataclass
class Batch:
    """Questions of K choices each: a prefix that all choices share, and the rest of each.

    What is counted and what it is divided by make the protocol, so the score function knows none.
    """

    prefix: Rows  # (B, T) tokens, at the right end of the row
    length: Rows  # (B,), how many of them there are
    prefix_counted: Rows  # (B, T), 1 where a token's likelihood counts
    rest: Rows  # (B, K, A) tokens
    counted: Rows  # (B, K, A), 1 where a token's likelihood counts
    divisor: Rows  # (B, K)
    shared: int = struct.field(pytree_node=False)  # only so many last prefix tokens count


def score(config: models.Config, weights: Any, adapter: Adapter, batch: Batch) -> Array:
    """The score (B, K) of each choice: its counted nats over its divisor; the lowest wins.

    One forward pass over the prefix followed by all choices, each of which sees the prefix and
    itself. Nothing is unembedded that does not count.
    """
    (rows, time), (_, choices, size) = batch.prefix.shape, batch.rest.shape
    fed = batch.rest[:, :, :-1].reshape(rows, -1)  # a last token is predicted, never read
    segments, positions = _places(batch)
    hidden = models.forward(
        config,
        weights,
        adapter,
        jnp.concatenate([batch.prefix, fed], axis=1),
        segments=segments,
        positions=positions,
    ).hidden

    width = hidden.shape[-1]
    last = jnp.broadcast_to(hidden[:, None, time - 1 : time], (rows, choices, 1, width))
    own = hidden[:, time:].reshape(rows, choices, size - 1, width)
    own = jnp.concatenate([last, own], axis=2).reshape(rows, choices * size, width)
    start = time - batch.shared
    scored = jnp.concatenate([hidden[:, start - 1 : time - 1], own], axis=1)
    targets = jnp.concatenate([batch.prefix[:, start:], batch.rest.reshape(rows, -1)], axis=1)

    nll = token_nll(config, weights, adapter, scored, targets)
    common = jnp.sum(nll[:, : batch.shared] * batch.prefix_counted[:, start:], axis=1)
    each = jnp.sum(nll[:, batch.shared :].reshape(batch.rest.shape) * batch.counted, axis=2)
    return (common[:, None] + each) / batch.divisor


def _places(batch: Batch) -> tuple[Array, Array]:
    """Segments and positions (B, T + K(A-1)): the prefix is seen by all, a choice by itself."""
    (rows, time), (_, choices, size) = batch.prefix.shape, batch.rest.shape
    slots = jnp.arange(time) - (time - batch.length[:, None])
    number = jnp.repeat(jnp.arange(1, choices + 1), size - 1)
    step = jnp.tile(jnp.arange(size - 1), choices)
    segments = [jnp.where(slots >= 0, -1, 0), jnp.broadcast_to(number, (rows, len(number)))]
    positions = [jnp.maximum(slots, 0), batch.length[:, None] + step]
    return jnp.concatenate(segments, axis=1), jnp.concatenate(positions, axis=1)

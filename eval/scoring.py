"""Multiple choice by log-likelihood: one pure function from a batch of questions to scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from eval.likelihood import over_logits, token_nll
from lora_jax import models
from lora_jax.losses import cross_entropy
from lora_jax.modules import Adapter

Array = jax.Array
Rows = jax.Array | np.ndarray  # on a device, or still on the host
SCORES = ("answer_mean", "text_mean", "sum", "char")


@struct.dataclass
class Batch:
    """Questions of K choices each: a prefix that all choices share, and the rest of each.

    The prefix is what an encoder reads, if the model has one. What is counted and what it is
    divided by make the protocol, so the score function knows none.
    """

    prefix: Rows  # (B, T) tokens, at the right end of the row
    segments: Rows  # (B, T), 0 where there is none, -1 where all choices see it, or a choice's own
    prefix_counted: Rows  # (B, T), 1 where a token's likelihood counts
    rest: Rows  # (B, K, A) tokens
    counted: Rows  # (B, K, A), 1 where a token's likelihood counts
    divisor: Rows  # (B, K)
    shared: int = struct.field(pytree_node=False)  # only so many last prefix tokens count


def score(config: models.Config, weights: Any, adapter: Adapter, batch: Batch) -> Array:
    """The score (B, K) of each choice: its counted nats over its divisor; the lowest wins.

    The prefix is read once, and each choice sees it and itself. Nothing is unembedded that does not
    count.
    """
    hidden, targets = _states(config, weights, adapter, batch)
    return _summed(token_nll(config, weights, adapter, hidden, targets), batch) / batch.divisor


def likelihood(config: models.Config, weights: Any, adapter: Adapter, batch: Batch) -> Array:
    """Of each choice, its counted nats and how many of its tokens are not the likeliest (B, K, 2).

    A choice with none of the latter is what greedy decoding would write.
    """

    def fate(logits: Array, targets: Array) -> tuple[Array, Array]:
        missed = jnp.argmax(logits, axis=-1) != targets
        return cross_entropy(logits, targets)[0], missed.astype(jnp.float32)

    hidden, targets = _states(config, weights, adapter, batch)
    nll, missed = over_logits(fate, config, weights, adapter, hidden, targets)
    return jnp.stack([_summed(nll, batch), _summed(missed, batch)], axis=-1)


def _summed(values: Array, batch: Batch) -> Array:
    """For each choice, the sum (B, K) of its tokens' values (B, shared + K A) that count."""
    start = batch.prefix.shape[1] - batch.shared
    common = jnp.sum(values[:, : batch.shared] * batch.prefix_counted[:, start:], axis=1)
    each = jnp.sum(values[:, batch.shared :].reshape(batch.rest.shape) * batch.counted, axis=2)
    return common[:, None] + each


def _states(
    config: models.Config, weights: Any, adapter: Adapter, batch: Batch
) -> tuple[Array, Array]:
    """The hidden states (B, shared + K A, D) that predict what may count, and those tokens."""
    sourced = models.kind(config) == "encoder-decoder"
    states = _states_after_source if sourced else _states_after_prefix
    return states(config, weights, adapter, batch)


def _states_after_prefix(
    config: models.Config, weights: Any, adapter: Adapter, batch: Batch
) -> tuple[Array, Array]:
    """The hidden states (B, shared + K A, D) that predict what may count, and those tokens.

    From one forward pass over the prefix followed by all choices.
    """
    (rows, time), (_, choices, size) = batch.prefix.shape, batch.rest.shape
    fed = batch.rest[:, :, :-1].reshape(rows, -1)  # a last token is predicted, never read
    segments, positions = _places(batch, config.context)
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
    return scored, jnp.concatenate([batch.prefix[:, start:], batch.rest.reshape(rows, -1)], axis=1)


def _states_after_source(
    config: models.Config, weights: Any, adapter: Adapter, batch: Batch
) -> tuple[Array, Array]:
    """The hidden states (B, K A, D) that predict every choice's tokens, and those tokens.

    The encoder reads the prefix; the decoder writes all choices, side by side in one row.
    """
    rows, choices, size = batch.rest.shape
    source, segments = jnp.asarray(batch.prefix), jnp.asarray(batch.segments)
    start = jnp.full((rows, choices, 1), models.start_token(config))
    fed = jnp.concatenate([start, batch.rest[:, :, :-1]], axis=2).reshape(rows, -1)
    number, step = _choice_places(rows, choices, size)
    memory = models.encode(config, weights, adapter, source, segments)
    hidden = models.forward(
        config, weights, adapter, fed, segments=number, positions=step, memory=memory
    ).hidden
    return hidden, jnp.asarray(batch.rest).reshape(rows, -1)


def _places(batch: Batch, context: int) -> tuple[Array, Array]:
    """Segments and positions (B, T + K(A-1)): the prefix is seen by all, a choice by itself.

    What fills a shorter choice up stays within the context, where positions are learned.
    """
    (rows, time), (_, choices, size) = batch.prefix.shape, batch.rest.shape
    length = jnp.sum(jnp.asarray(batch.segments) != 0, axis=1, keepdims=True)
    slots = jnp.arange(time) - (time - length)
    number, step = _choice_places(rows, choices, size - 1)
    segments = jnp.concatenate([batch.segments, number], axis=1)
    after = jnp.minimum(length + step, context - 1)
    return segments, jnp.concatenate([jnp.maximum(slots, 0), after], axis=1)


def _choice_places(rows: int, choices: int, size: int) -> tuple[Array, Array]:
    """Segments and positions (B, K A) of choices of `size` tokens side by side, both from a start.

    Segments count from 1, positions from 0.
    """
    number = jnp.repeat(jnp.arange(1, choices + 1), size)
    step = jnp.tile(jnp.arange(size), choices)
    return jnp.broadcast_to(number, (rows, len(number))), jnp.broadcast_to(step, (rows, len(step)))

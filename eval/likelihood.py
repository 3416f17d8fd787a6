"""The negative log-likelihood of tokens, without the logits of every position at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.losses import cross_entropy, in_chunks
from lora_jax.modules import Adapter

Array = jax.Array

# Logits that exist at a time: 128 MiB in float32.
_LOGITS = 1 << 25


def token_nll(
    config: models.Config, weights: Any, adapter: Adapter, hidden: Array, targets: Array
) -> Array:
    """The negative log-likelihood (B, T), in nats, of `targets` (B, T) given `hidden` (B, T, D)."""

    def nll(logits: Array, targets: Array) -> Array:
        return cross_entropy(logits, targets)[0]

    return over_logits(nll, config, weights, adapter, hidden, targets)


def over_logits(
    function: Callable[[Array, Array], Any],
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    hidden: Array,
    targets: Array,
) -> Any:
    """`function` of the logits (B, T, V) of hidden states (B, T, D), and of `targets` (B, T).

    Logits are float32 whatever the compute type, and made for a stretch of positions at a time; the
    rows stay whole, so that a mesh may spread them.
    """
    rows, time, _ = hidden.shape
    chunks = min(time, math.ceil(rows * time * config.vocabulary / _LOGITS))
    head = models.unembedding(config, weights, adapter)
    kernel = head.kernel.astype(hidden.dtype)

    def of(hidden: Array, targets: Array) -> Any:
        """The function of a chunk's logits."""
        logits = jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)
        if head.bias is not None:
            logits = logits + head.bias.astype(jnp.float32)
        return function(logits, targets)

    if chunks <= 1:
        return of(hidden, targets)
    return in_chunks(of, (hidden, targets), math.ceil(time / chunks), axis=1)

"""The negative log-likelihood of tokens, without the logits of every position at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models

Array = jax.Array

# Logits that exist at a time: 128 MiB in float32.
_LOGITS = 1 << 25


def token_nll(config: models.Config, weights: Any, hidden: Array, targets: Array) -> Array:
    """The negative log-likelihood (B, T), in nats, of `targets` (B, T) given `hidden` (B, T, D).

    Logits are float32 whatever the compute type, and made for a stretch of positions at a time; the
    rows stay whole, so that a mesh may spread them.
    """
    rows, time, _ = hidden.shape
    chunks = min(time, math.ceil(rows * time * config.vocabulary / _LOGITS))
    kernel = models.unembedding(config, weights).astype(hidden.dtype)
    if chunks <= 1:
        return _nll(hidden, kernel, targets)
    filling = -time % chunks
    hidden = jnp.pad(hidden, ((0, 0), (0, filling), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, filling)))
    split = (jnp.stack(jnp.split(x, chunks, axis=1)) for x in (hidden, targets))
    nll = jax.lax.map(lambda chunk: _nll(chunk[0], kernel, chunk[1]), tuple(split))
    return jnp.moveaxis(nll, 0, 1).reshape(rows, -1)[:, :time]


def _nll(hidden: Array, kernel: Array, targets: Array) -> Array:
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

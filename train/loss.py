"""Cross-entropy where labels are, in chunks, so that no (batch, time, vocabulary) array exists."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import models
from lora_jax.modules import Adapter
from lora_jax.project import Dropout

CHUNK = 512  # positions whose logits exist at a time


@struct.dataclass
class Batch:
    """Rows of tokens, and the positions that are scored (K a row, the same for every row)."""

    tokens: jax.Array  # (B, T)
    segments: jax.Array  # (B, T), 0 is padding; packed texts are numbered from 1
    positions: jax.Array  # (B, T), counted within each text
    scored: jax.Array  # (B, K), where the hidden state predicts a label
    targets: jax.Array  # (B, K), the token that follows
    weights: jax.Array  # (B, K), 1, or 0 for filling


def token_losses(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """Each position's negative log-likelihood in nats (P,), from hidden (P, D) and targets (P,).

    The unembedding `kernel` (D, V) is frozen: no gradient reaches it. The gradient for `hidden` is
    made in the forward pass, while a chunk's logits are at hand, so they are computed only once.
    """
    return _losses(hidden, jax.lax.stop_gradient(kernel), targets)


@jax.custom_vjp
def _losses(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    return _chunked(_chunk_losses, hidden, kernel, targets)


def _forward(hidden: jax.Array, kernel: jax.Array, targets: jax.Array):
    losses, slopes = _chunked(_chunk_losses_and_slopes, hidden, kernel, targets)
    return losses, (slopes, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    slopes, kernel = residuals
    return (cotangent[:, None] * slopes).astype(slopes.dtype), jnp.zeros_like(kernel), None


_losses.defvjp(_forward, _backward)


def _chunked(function: Any, hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> Any:
    """`function` over chunks of positions, one after the other."""
    count = len(targets)
    filling = -count % min(CHUNK, count)
    hidden = jnp.pad(hidden, ((0, filling), (0, 0)))
    targets = jnp.pad(targets, (0, filling))
    chunks = (count + filling) // min(CHUNK, count)
    split = (hidden.reshape(chunks, -1, hidden.shape[-1]), targets.reshape(chunks, -1))
    out = jax.lax.map(lambda chunk: function(chunk[0], kernel, chunk[1]), split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _chunk_losses(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def _chunk_losses_and_slopes(hidden: jax.Array, kernel: jax.Array, targets: jax.Array):
    """A chunk's losses, and their gradients (P, D): (softmax - one-hot) times the kernel."""
    kernel = kernel.astype(hidden.dtype)
    logits = (hidden @ kernel).astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    chances = jnp.exp(logits - total[:, None]).astype(hidden.dtype)
    slopes = chances @ kernel.T - kernel[:, targets].T
    return total - picked, slopes


def batch_loss(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    batch: Batch,
    *,
    dropout: Dropout | None = None,
    remat: bool = False,
) -> jax.Array:
    """The sum over a batch's labels of their negative log-likelihoods, in nats."""
    hidden = models.forward(
        config,
        weights,
        adapter,
        batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        dropout=dropout,
        remat=remat,
    ).hidden
    scored = jnp.take_along_axis(hidden, batch.scored[..., None], axis=1)
    kernel = models.unembedding(config, weights)
    flat = token_losses(scored.reshape(-1, scored.shape[-1]), kernel, batch.targets.reshape(-1))
    return jnp.sum(flat * batch.weights.reshape(-1))

"""Cross-entropy where labels are, in chunks, so that no (batch, time, vocabulary) array exists."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import models
from lora_jax.losses import cross_entropy, in_chunks
from lora_jax.models import Unembedding
from lora_jax.modules import Adapter
from lora_jax.project import Dropout

CHUNK = 512  # positions whose logits exist at a time


@struct.dataclass
class Source:
    """Rows of tokens that an encoder reads."""

    tokens: jax.Array  # (B, S)
    segments: jax.Array  # (B, S), 1, or 0 for padding


@struct.dataclass
class Batch:
    """Rows of tokens, and the positions that are scored (K a row, the same for every row)."""

    tokens: jax.Array  # (B, T)
    segments: jax.Array  # (B, T), 0 is padding; packed texts are numbered from 1
    positions: jax.Array  # (B, T), counted within each text
    scored: jax.Array  # (B, K), where the hidden state predicts a label
    targets: jax.Array  # (B, K), the token that follows, or a classifier's label
    weights: jax.Array  # (B, K), 1, or 0 for filling
    source: Source | None = None  # where the base model is an encoder-decoder


def token_losses(hidden: jax.Array, head: Unembedding, targets: jax.Array) -> jax.Array:
    """Each position's negative log-likelihood in nats (P,), from hidden (P, D) and targets (P,).

    The unembedding is frozen: no gradient reaches it. The gradient for `hidden` is made in the
    forward pass, while a chunk's logits are at hand, so they are computed only once.
    """
    return _frozen_losses(hidden, jax.lax.stop_gradient(head), targets)


def trained_losses(hidden: jax.Array, head: Unembedding, targets: jax.Array) -> jax.Array:
    """The same losses where a module trains the unembedding; a chunk's logits are made twice."""

    losses = jax.checkpoint(partial(_losses, head))
    return in_chunks(losses, (hidden, targets), CHUNK)


def entropies(hidden: jax.Array, head: Unembedding) -> jax.Array:
    """The entropy in nats (P,) of the guess at the next token, from hidden (P, D)."""
    return in_chunks(jax.checkpoint(partial(_entropies, head)), (hidden,), CHUNK)


def _entropies(head: Unembedding, hidden: jax.Array) -> jax.Array:
    """A chunk's entropies (P,)."""
    chances = jax.nn.log_softmax(_logits(hidden, head))
    return -jnp.sum(jnp.exp(chances) * chances, axis=-1)


def _losses(head: Unembedding, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """A chunk's losses (P,)."""
    return cross_entropy(_logits(hidden, head), targets)[0]


@jax.custom_vjp
def _frozen_losses(hidden: jax.Array, head: Unembedding, targets: jax.Array) -> jax.Array:
    return in_chunks(partial(_losses, head), (hidden, targets), CHUNK)


def _forward(hidden: jax.Array, head: Unembedding, targets: jax.Array):
    """The losses, and what `_backward` needs: their gradients (P, D) for `hidden`, and the head.

    A loss's gradient is (softmax - one-hot) times the kernel.
    """

    def losses_and_gradients(hidden: jax.Array, targets: jax.Array):
        logits, table = _logits(hidden, head), head.kernel.astype(hidden.dtype)
        losses, total = cross_entropy(logits, targets)
        chances = jnp.exp(logits - total[:, None]).astype(hidden.dtype)
        return losses, chances @ table.T - table[:, targets].T

    losses, gradients = in_chunks(losses_and_gradients, (hidden, targets), CHUNK)
    return losses, (gradients, head)


def _backward(residuals: tuple[jax.Array, Unembedding], cotangent: jax.Array):
    gradients, head = residuals
    nothing = jax.tree.map(jnp.zeros_like, head)
    return (cotangent[:, None] * gradients).astype(gradients.dtype), nothing, None


_frozen_losses.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, head: Unembedding) -> jax.Array:
    """Logits (P, V), multiplied in the compute type and then float32."""
    logits = (hidden @ head.kernel.astype(hidden.dtype)).astype(jnp.float32)
    return logits if head.bias is None else logits + head.bias.astype(jnp.float32)


def batch_loss(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    batch: Batch,
    **options: Any,
) -> jax.Array:
    """The sum over a batch's labels of their negative log-likelihoods, in nats."""
    return batch_sums(config, weights, adapter, batch, **options)["loss"]


def batch_sums(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    batch: Batch,
    *,
    dropout: Dropout | None = None,
    remat: bool = False,
    entropy: bool = False,
) -> dict[str, jax.Array]:
    """Sums over a batch's labels: "loss", in nats, "labels", how many there are, and "accuracy".

    The last, how many were the likeliest, is there only if the base model is a classifier. The loss
    is the labels' negative log-likelihood, or the `entropy` of the guesses at them.
    """
    options = {"dropout": dropout, "remat": remat}
    memory = None
    if batch.source is not None:
        source = (batch.source.tokens, batch.source.segments)
        memory = models.encode(config, weights, adapter, *source, **options)
    hidden = models.forward(
        config,
        weights,
        adapter,
        batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        memory=memory,
        **options,
    ).hidden
    scored = jnp.take_along_axis(hidden, batch.scored[..., None], axis=1)
    labels = {"labels": batch.weights.sum()}
    if models.kind(config) == "classifier":
        return labels | _label_sums(models.label_logits(config, weights, adapter, scored), batch)
    head, states = (
        models.unembedding(config, weights, adapter),
        scored.reshape(-1, scored.shape[-1]),
    )
    if entropy:
        flat = entropies(states, head)
    else:
        losses = trained_losses if models.trains_unembedding(adapter) else token_losses
        flat = losses(states, head, batch.targets.reshape(-1))
    return labels | {"loss": jnp.sum(flat * batch.weights.reshape(-1))}


def _label_sums(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The summed loss of logits (B, K, labels), and how many of the likeliest are right."""
    losses, _ = cross_entropy(logits.astype(jnp.float32), batch.targets)
    right = jnp.argmax(logits, axis=-1) == batch.targets
    return {"loss": jnp.sum(losses * batch.weights), "accuracy": jnp.sum(right * batch.weights)}

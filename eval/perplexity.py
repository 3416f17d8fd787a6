"""Perplexity of a long text, by windows that overlap, so that every token has a long context."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from eval.likelihood import token_nll
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

Array = jax.Array
Rows = jax.Array | np.ndarray  # on a device, or still on the host


@struct.dataclass
class Windows:
    """Windows of a text, each with the tokens that it scores at its right end."""

    tokens: Rows  # (B, T)
    segments: Rows  # (B, T), 1 where there is a token
    scored: Rows  # (B, stride), 1 where one of the last tokens is scored


def windows(
    tokens: np.ndarray, window: int = 1024, stride: int = 512, opening: int | None = None
) -> Windows:
    """The windows of a text's `tokens`, such that all but the first are scored exactly once.

    A token is scored with all that precedes it in the first window, and with `window - stride`
    tokens or more after that: the protocol of PEM for WikiText-2. An `opening` token, which some
    models read nothing without, stands first in every later window too, in a token's place.
    """
    if not 0 < stride < window:
        raise InputError(f"a stride must lie between 1 and the window, {window}; got {stride}")
    if len(tokens) < 2:
        raise InputError("a text must have at least two tokens to have a perplexity")
    # Causal attention lets the first window be scored in strides too, so that all are alike.
    starts = np.arange(-(-window % stride), len(tokens), stride)
    held, segments, scored = (
        np.zeros((len(starts), size), np.int32) for size in (window, window, stride)
    )
    for row, start in enumerate(starts):
        origin = start + stride - window  # of slot 0, in the text
        first, last = max(0, origin), min(start + stride, len(tokens))
        held[row, first - origin : last - origin] = tokens[first:last]
        segments[row, first - origin : last - origin] = 1
        scored[row, max(1 - start, 0) : last - start] = 1
        if opening is not None and origin > 0:
            held[row, 0] = opening
    return Windows(held, segments, scored)


def batches(whole: Windows, *, tokens: int, multiple: int = 1) -> list[tuple[np.ndarray, Windows]]:
    """The windows in batches of about `tokens` tokens, with their indices; see `batches.plan`."""
    count, window = whole.tokens.shape
    number = math.ceil(count / max(1, tokens // window))
    rows = math.ceil(count / number / multiple) * multiple

    def part(start: int) -> Windows:
        """The batch that begins at window `start`, filled up with empty windows."""
        filling = max(0, start + rows - count)
        return jax.tree.map(
            lambda x: np.pad(x[start : start + rows], ((0, filling), (0, 0))), whole
        )

    starts = range(0, count, rows)
    return [(np.arange(start, min(start + rows, count)), part(start)) for start in starts]


def window_nll(config: models.Config, weights: Any, adapter: Adapter, windows: Windows) -> Array:
    """The summed negative log-likelihood (B,), in nats, of each window's scored tokens."""
    tokens = jnp.asarray(windows.tokens)
    start = tokens.shape[1] - windows.scored.shape[1]
    hidden = models.forward(
        config, weights, adapter, tokens, segments=jnp.asarray(windows.segments)
    ).hidden
    nll = token_nll(config, weights, adapter, hidden[:, start - 1 : -1], tokens[:, start:])
    return jnp.sum(nll * windows.scored, axis=1)

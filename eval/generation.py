"""Text from a model: greedy or sampled, in batches, over the key-value cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import models
from lora_jax.errors import refuse_all
from lora_jax.lengths import bucket
from lora_jax.modules import Adapter
from lora_jax.parts import Cache

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64  # in a reply
    temperature: float = 0.0  # 0 takes the likeliest
    top_p: float = 1.0  # the likeliest tokens that together have this probability
    top_k: int = 0  # only so many of the likeliest; 0 is all
    seed: int = 0

    def __post_init__(self) -> None:
        count, heat = self.max_new_tokens, self.temperature
        problems = {
            f"max_new_tokens must be at least 1; got {count}": count < 1,
            f"temperature must lie in [0, inf); got {heat}": not 0 <= heat < math.inf,
            f"top_p must lie in (0, 1]; got {self.top_p}": not 0 < self.top_p <= 1,
            f"top_k must not be negative; got {self.top_k}": self.top_k < 0,
        }
        refuse_all([text for text, wrong in problems.items() if wrong], "sampling")


@struct.dataclass
class _State:
    """What one new token hands on to the next."""

    step: Array  # (), tokens written
    token: Array  # (B,), the newest
    done: Array  # (B,), rows that have ended
    written: Array  # (B, max_new_tokens)
    cache: Cache | None


@partial(jax.jit, static_argnames=("config", "sampling", "stop"))
def continuations(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    tokens: Array,
    length: Array,
    keys: Array,
    *,
    sampling: Sampling,
    stop: int,
) -> Array:
    """The tokens (B, max_new_tokens) that follow prompts (B, T) of `length` (B,), padded right.

    A row ends with `stop` and is filled with it; all stop when every row has. `keys` (B,) make a
    row's draws its own, whatever batch it is in.
    """
    hidden, cache = _prefill(config, weights, adapter, tokens, length, sampling.max_new_tokens)

    def choose(hidden: Array, step: Array) -> Array:
        """Each row's next token (B,), drawn with its own key for this step."""
        logits = models.unembed(config, weights, adapter, hidden[:, 0]).astype(jnp.float32)
        return _choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling)

    def step(state: _State) -> _State:
        """The state with one more token a row."""
        out = models.forward(config, weights, adapter, state.token[:, None], cache=state.cache)
        state = replace(state, cache=out.cache)
        return _written(state, choose(out.hidden, state.step), stop)

    def unfinished(state: _State) -> Array:
        return (state.step < sampling.max_new_tokens) & ~state.done.all()

    none = jnp.full((len(tokens), sampling.max_new_tokens), stop, jnp.int32)
    state = _State(jnp.array(0), none[:, 0], length == 0, none, cache)
    state = _written(state, choose(hidden, state.step), stop)
    return jax.lax.while_loop(unfinished, step, state).written


def _prefill(
    config: models.Config, weights: Any, adapter: Adapter, tokens: Array, length: Array, new: int
) -> tuple[Array, Cache | None]:
    """The hidden state (B, 1, D) of each prompt's last token, and the cache that holds them all."""
    rows, time = tokens.shape
    cache = models.new_cache(config, rows, time + new - 1, weights["embed"].dtype)
    segments = (jnp.arange(time) < length[:, None]).astype(jnp.int32)
    out = models.forward(config, weights, adapter, tokens, segments=segments, cache=cache)
    return jnp.take_along_axis(out.hidden, length[:, None, None] - 1, axis=1), out.cache


def _written(state: _State, token: Array, stop: int) -> _State:
    """The state with each row's next token, or `stop` where the row has ended."""
    token = jnp.where(state.done, stop, token)
    return replace(
        state,
        step=state.step + 1,
        token=token,
        done=state.done | (token == stop),
        written=state.written.at[:, state.step].set(token),
    )


def _choose(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """A token (B,) for each row of logits (B, V)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ranked, axis=-1)
        kept = jnp.cumsum(chances, axis=-1) - chances < sampling.top_p
        if sampling.top_k:
            kept &= jnp.arange(logits.shape[-1]) < sampling.top_k
        least = jnp.min(ranked, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def generate(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    *,
    stop: int,
    sampling: Sampling,
    tokens: int = 4096,
) -> list[list[int]]:
    """What follows each prompt, in tokens, without the `stop` that ends it.

    Prompts of like length share a batch of about `tokens` tokens, the new ones included. An empty
    prompt gets an empty reply.
    """
    pending, drawn = [], replace(sampling, seed=0)  # the keys carry the seed: no recompilation
    for time, chosen in _by_length(prompts, sampling.max_new_tokens, tokens):
        padded = np.zeros((len(chosen), time), np.int32)
        for row, n in enumerate(chosen):
            padded[row, : len(prompts[n])] = prompts[n]
        length = np.array([len(prompts[n]) for n in chosen], np.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(sampling.seed), np.array(chosen)
        )
        out = continuations(
            config, weights, adapter, padded, length, keys, sampling=drawn, stop=stop
        )
        pending.append((chosen, out))
    replies: dict[int, list[int]] = {}
    for chosen, out in pending:
        replies |= {n: _until(row, stop) for n, row in zip(chosen, np.asarray(out), strict=True)}
    return [replies[n] for n in range(len(prompts))]


def _by_length(
    prompts: Sequence[Sequence[int]], new: int, tokens: int
) -> list[tuple[int, list[int]]]:
    """Prompts by the bucket of their length, in batches of about `tokens` with the `new` ones."""
    groups: dict[int, list[int]] = {}
    for n, prompt in enumerate(prompts):
        groups.setdefault(bucket(max(len(prompt), 8)), []).append(n)
    planned = []
    for time, members in sorted(groups.items()):
        count = math.ceil(len(members) / max(1, tokens // (time + new)))
        rows = math.ceil(len(members) / count)
        planned += [(time, members[n : n + rows]) for n in range(0, len(members), rows)]
    return planned


def _until(row: np.ndarray, stop: int) -> list[int]:
    """The tokens before the first `stop`."""
    ended = np.flatnonzero(row == stop)
    return row[: ended[0]].tolist() if len(ended) else row.tolist()

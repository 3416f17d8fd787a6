"""Text from a model: greedy or sampled, in batches, over the key-value cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import models
from lora_jax.errors import refuse_all
from lora_jax.lengths import bucket
from lora_jax.modules import Adapter
from lora_jax.parts import Cache, Memory
from lora_jax.per_example import of_rows, refuse_rows
from lora_jax.progress import bar

Array = jax.Array
Ended = Callable[[int, list[int]], bool]  # a prompt's index and the reply so far; see `generate`

_STRIDE = 16  # tokens between two looks at what was written


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
    written: Array  # (B, max_new_tokens), filled with `stop`
    keys: Array  # (B,), which make a row's draws its own, whatever batch it is in
    cache: Cache | None
    memory: Memory | None


@partial(jax.jit, static_argnames=("config", "sampling", "stop"))
def _begin(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    tokens: Array,
    length: Array,
    keys: Array,
    *,
    sampling: Sampling,
    stop: int,
) -> _State:
    """The state after the first token that follows prompts (B, T) of `length` (B,), padded right.

    A row ends with `stop`.
    """
    new = sampling.max_new_tokens
    hidden, cache, memory = _prefill(config, weights, adapter, tokens, length, new)
    none = jnp.full((len(tokens), new), stop, jnp.int32)
    state = _State(jnp.array(0), none[:, 0], length == 0, none, keys, cache, memory)
    return _extended(state, hidden, config, weights, adapter, sampling, stop)


@partial(jax.jit, static_argnames=("config", "sampling", "stop"))
def _advance(
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    state: _State,
    until: int | Array,
    *,
    sampling: Sampling,
    stop: int,
) -> _State:
    """The state with `until` tokens a row, or fewer if every row has ended."""

    def step(state: _State) -> _State:
        """The state with one more token a row."""
        caches = {"cache": state.cache, "memory": state.memory}
        out = models.forward(config, weights, adapter, state.token[:, None], **caches)
        state = replace(state, cache=out.cache)
        return _extended(state, out.hidden, config, weights, adapter, sampling, stop)

    def unfinished(state: _State) -> Array:
        return (state.step < until) & ~state.done.all()

    return jax.lax.while_loop(unfinished, step, state)


def _prefill(
    config: models.Config, weights: Any, adapter: Adapter, tokens: Array, length: Array, new: int
) -> tuple[Array, Cache | None, Memory | None]:
    """The hidden state (B, 1, D) of each prompt's last token, and the cache that holds them all.

    An encoder-decoder's prompts are in the memory, and its start token alone is in the cache.
    """
    segments = (jnp.arange(tokens.shape[1]) < length[:, None]).astype(jnp.int32)
    memory = None
    if models.kind(config) == "encoder-decoder":
        memory = models.encode(config, weights, adapter, tokens, segments)
        length, segments = jnp.ones_like(length), jnp.ones_like(segments[:, :1])
        tokens = jnp.full_like(segments, models.start_token(config))
    rows, time = tokens.shape
    cache = models.new_cache(config, rows, time + new - 1, weights["embed"].dtype)
    out = models.forward(
        config, weights, adapter, tokens, segments=segments, cache=cache, memory=memory
    )
    hidden = jnp.take_along_axis(out.hidden, length[:, None, None] - 1, axis=1)
    return hidden, out.cache, memory


def _extended(
    state: _State,
    hidden: Array,
    config: models.Config,
    weights: Any,
    adapter: Adapter,
    sampling: Sampling,
    stop: int,
) -> _State:
    """The state with each row's next token, which `hidden` (B, 1, D) predicts; `stop` if ended."""
    logits = models.unembed(config, weights, adapter, hidden[:, 0]).astype(jnp.float32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = jnp.where(state.done, stop, _choose(logits, keys, sampling))
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
    ended: Ended | None = None,
    told: str = "replies",
) -> list[list[int]]:
    """What follows each prompt, in tokens, without the `stop` that ends it.

    An adapter of `compose.slots` has a row for each prompt: each runs under its own.
    Prompts of like length share a batch of about `tokens` tokens, the new ones included. An empty
    prompt gets an empty reply. `ended(n, reply)`, asked every few tokens, may end the reply to
    prompt n; what it has is kept. The progress bar is of what is `told`.
    """
    refuse_rows(adapter, len(prompts))
    replies: dict[int, list[int]] = {}
    how = {"sampling": replace(sampling, seed=0), "stop": stop}  # keys carry the seed, uncompiled

    def written(time: int, chosen: list[int]) -> tuple[list[int], Array]:
        """A batch's prompts, and what follows them."""
        model = (config, weights, of_rows(adapter, chosen))
        state = _begin(*model, *_padded(prompts, chosen, time), _keys(sampling, chosen), **how)
        advance = partial(_advance, *model, **how)
        if ended is None:
            return chosen, advance(state, sampling.max_new_tokens).written
        return chosen, _watched(advance, state, chosen, ended)

    with bar("writing") as progress:
        task = progress.add_task(told, total=len(prompts), note="")
        work = starmap(written, _by_length(prompts, sampling.max_new_tokens, tokens))
        for chosen, rows in work if ended else list(work):  # unwatched, all are under way at once
            replies |= {
                n: _until(row, stop) for n, row in zip(chosen, np.asarray(rows), strict=True)
            }
            progress.update(task, advance=len(chosen))
    return [replies[n] for n in range(len(prompts))]


def _padded(
    prompts: Sequence[Sequence[int]], chosen: Sequence[int], time: int
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen prompts (B, T), padded right, and how long they are (B,)."""
    padded = np.zeros((len(chosen), time), np.int32)
    for row, n in enumerate(chosen):
        padded[row, : len(prompts[n])] = prompts[n]
    return padded, np.array([len(prompts[n]) for n in chosen], np.int32)


def _keys(sampling: Sampling, chosen: Sequence[int]) -> Array:
    """A random key (B,) for each of the chosen prompts."""
    key = jax.random.key(sampling.seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(chosen))


def _watched(
    advance: Callable[..., _State], state: _State, chosen: Sequence[int], ended: Ended
) -> Array:
    """What follows the chosen prompts, a few tokens at a time until `ended` or all are written."""
    for until in range(_STRIDE, state.written.shape[1] + _STRIDE, _STRIDE):
        state = advance(state, min(until, state.written.shape[1]))
        step, done = int(state.step), np.asarray(state.done)
        replies = np.asarray(state.written[:, :step]).tolist()
        done = [d or ended(n, r) for d, n, r in zip(done, chosen, replies, strict=True)]
        if all(done):
            break
        state = replace(state, done=jnp.array(done))
    return state.written


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

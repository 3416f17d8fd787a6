"""What a forward pass says about modules: what each is used to, and how loudly each answers."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compose.library import Library
from compose.routing.build import factors
from compose.routing.settings import refuse_other_kinds
from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.models import Observe
from lora_jax.modules import Adapter, Module

Array = jax.Array
POOLS, SIGNALS = ("last", "mean"), ("norm", "entropy")


def activations(
    config: models.Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    batches: Iterable[tuple[Array, Array]],
    *,
    pool: str = "last",
) -> dict[str, Array]:
    """The unit mean input (N, I) of each projection that a module changes, on its own data.

    `batches` are tokens and segments (B, T), one text a row, 0 being padding. A text counts by its
    "last" token or by the "mean" of all. MTTL's average-activation selector; it takes 10 examples.
    """
    if pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; choose {' or '.join(POOLS)}")
    total: dict[str, Array] = {}
    for tokens, segments in batches:
        found = _pooled(config, weights, adapter, tokens, segments, pool)
        total = jax.tree.map(jnp.add, total, found) if total else found
    if not total:
        raise InputError("no batch to take activations from; give at least one")
    lengths = {path: jnp.linalg.norm(row, axis=-1, keepdims=True) for path, row in total.items()}
    return {path: row / jnp.maximum(lengths[path], 1e-12) for path, row in total.items()}


@partial(jax.jit, static_argnames=("config", "pool"))
def _pooled(config, weights, adapter, tokens, segments, pool):
    """The sum over texts of what each projection with a module reads, by layer."""

    def observe(path: str, module: Module | None, x: Array) -> Array | None:
        """The pooled input (I,) of one projection, summed over the batch."""
        if module is None:
            return None
        if pool == "last":
            return jnp.sum(_last(x, segments), axis=0)
        inside = (segments != 0)[..., None]
        count = jnp.maximum(jnp.sum(inside, axis=1), 1)
        return jnp.sum(jnp.sum(x, axis=1, where=inside) / count, axis=0)

    found = _observed(config, weights, adapter, tokens, segments, observe)
    return {path: row.astype(jnp.float32) for path, row in found.items() if row is not None}


def _observed(config, weights, adapter, tokens, segments, observe: Observe) -> dict[str, Any]:
    """What is observed of texts, each row's segments made one so that padding is all it has."""
    segments = (segments != 0).astype(jnp.int32)
    return models.forward(
        config, weights, adapter, tokens, segments=segments, observe=observe
    ).observed


def _last(x: Array, segments: Array) -> Array:
    """x (B, I) at the last real token of each row of x (B, T, I)."""
    last = segments.shape[1] - 1 - jnp.argmax((segments != 0)[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def instance_weights(
    config: models.Config,
    weights: Mapping[str, Any],
    library: Library,
    tokens: Array,
    segments: Array | None = None,
    *,
    top_k: int,
    signal: str = "norm",
    at: str | None = None,
    probe: Adapter | None = None,
) -> Array:
    """Each text's mixing weights (B, M) by how its last token moves each module (LoGo).

    Lee et al., "LoRA on the Go" (2511.07129): one forward pass, under `probe` or the base alone; at
    the last layer's projection `at` (the library's first: queries) a module scores ‖Δ(x)‖, or with
    the signal "entropy" one over the entropy of softmax(Δ(x)). The best `top_k` share the weight in
    proportion. x is what the projection reads; the authors' code takes it before the norm.
    `compose.routing.given.with_weights` mixes by them.
    """
    _refuse_settings(library, top_k, signal)
    table = factors(library.adapters)
    at = (
        next((path for path in models.projections(config) if path in table), "")
        if at is None
        else at
    )
    if at not in table:
        raise InputError(f"no module at {at!r} to probe; the library has {', '.join(table)}")
    segments = jnp.ones_like(tokens) if segments is None else segments
    a, b = (leaf[-1] for leaf in table[at])
    x = _read(config, weights, probe or {}, tokens, segments, at)
    scores = _signals(x, a, b, signal)
    best, index = jax.lax.top_k(scores, top_k)
    share = best / jnp.maximum(jnp.sum(best, axis=-1, keepdims=True), 1e-12)
    return jnp.put_along_axis(jnp.zeros_like(scores), index, share, axis=-1, inplace=False)


def _refuse_settings(library: Library, top_k: int, signal: str) -> None:
    refuse_other_kinds(library)
    count, problems = len(library.names), []
    if not 1 <= top_k <= count:
        problems.append(f"top_k must lie between 1 and the library's {count} modules; got {top_k}")
    if signal not in SIGNALS:
        problems.append(f"unknown signal {signal!r}; choose {' or '.join(SIGNALS)}")
    refuse_all(problems, "LoGo")


@partial(jax.jit, static_argnames=("config", "at"))
def _read(config, weights, probe, tokens, segments, at):
    """What the last layer's projection `at` reads (B, I) at each text's last token."""

    def observe(path: str, module: Module | None, x: Array) -> Array | None:
        return _last(x, segments) if path == at else None

    return _observed(config, weights, probe, tokens, segments, observe)[at][-1]


@partial(jax.jit, static_argnames="signal")
def _signals(x: Array, a: Array, b: Array, signal: str) -> Array:
    """Each module's score (B, M) for x (B, I), one module after another: no (B, M, O) exists."""

    def one(factors: tuple[Array, Array]) -> Array:
        out = (x @ factors[0].astype(x.dtype) @ factors[1].astype(x.dtype)).astype(jnp.float32)
        if signal == "norm":
            return jnp.linalg.norm(out, axis=-1)
        logs = jax.nn.log_softmax(out)
        return 1 / (1e-6 - jnp.sum(jnp.exp(logs) * logs, axis=-1))

    return jax.lax.map(one, (a, b)).T

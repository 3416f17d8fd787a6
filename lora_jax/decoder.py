"""One forward pass, whatever the family: places, cache, modules and the walk over the layers.

A family says how a pass begins, what one layer does and how it ends; everything that a module, a
cache, dropout, observation or rematerialisation needs is done here, once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.modules import Adapter, LoRA, Module, Saved
from lora_jax.parts import Cache, attend, attention_mask, put
from lora_jax.project import Dropout, project

Array = jax.Array
Observe = Callable[[str, Module | None, Array], Any]


@struct.dataclass
class Output:
    """What a forward pass gives."""

    hidden: Array  # (B, T, D), after the last norm
    cache: Cache | None = None  # the cache given, with this pass's positions in it
    observed: Any = None  # what `observe` returned, by projection, each leaf with a layer axis


@struct.dataclass
class Places:
    """Where the tokens of a pass stand, and where every key that they may see stands."""

    segments: Array  # (B, T)
    positions: Array  # (B, T)
    key_segments: Array  # (B, S)
    key_positions: Array  # (B, S)
    used: Array | int  # slots before this pass

    def mask(self, window: int | None = None) -> Array:
        """Which key (B, 1, T, S) each query may see; see `parts.attention_mask`."""
        return attention_mask(
            self.segments,
            self.positions,
            self.key_segments,
            self.key_positions,
            self.used,
            window,
        )


@dataclass(frozen=True)
class Layer:
    """One layer as its family's code sees it."""

    number: Array  # (), counted from 0
    weights: Mapping[str, Array]  # this layer's weights, by path
    project: Callable[[str, Array], Array]  # the projection at a path, under its module
    attend: Callable[..., Array]  # `parts.attend`, over the cached keys and values too


def forward(
    family: Any,
    config: Any,
    weights: Mapping[str, Any],
    adapter: Adapter,
    tokens: Array,
    *,
    segments: Array | None = None,
    positions: Array | None = None,
    cache: Cache | None = None,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> Output:
    """The final hidden states (B, T, D) of tokens (B, T); see `models.forward`."""
    weights, adapter = with_saved(weights, adapter)
    places = place(tokens, segments, positions, cache)
    x = embed(weights["embed"], tokens, adapter.get("embed"))
    x, shared = family.begin(config, weights, x, places)
    x, out = walk(
        partial(family.layer, config, shared),
        x,
        weights["layers"],
        within(adapter, weights["layers"]),
        pages=None if cache is None else (cache.keys, cache.values),
        used=places.used,
        dropout=dropout,
        observe=observe,
        remat=remat,
    )
    if cache is not None:
        keys, values = out["pages"]
        index = (places.key_segments, places.key_positions)
        cache = Cache(keys, values, *index, cache.used + tokens.shape[1])
    return Output(family.finish(config, weights, x), cache, out.get("observed"))


def place(
    tokens: Array, segments: Array | None, positions: Array | None, cache: Cache | None
) -> Places:
    """The places of tokens (B, T): if unsaid, one segment a row, positions counted on."""
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        real = (segments != 0).astype(jnp.int32)
        start = 0 if cache is None else jnp.sum(cache.segments != 0, axis=1, keepdims=True)
        positions = jnp.maximum(start + jnp.cumsum(real, axis=1) - 1, 0)
    if cache is None:
        return Places(segments, positions, segments, positions, 0)
    seen = put(cache.segments, segments, cache.used), put(cache.positions, positions, cache.used)
    return Places(segments, positions, *seen, cache.used)


def embed(kernel: Array, tokens: Array, module: Module | None) -> Array:
    """The embeddings (..., D) of tokens (...), with what a LoRA of the embedding adds."""
    x = kernel[tokens]
    if isinstance(module, LoRA):
        x = x + (module.scale * module.a[tokens] @ module.b).astype(x.dtype)
    return x


def with_saved(
    weights: Mapping[str, Any], adapter: Adapter
) -> tuple[Mapping[str, Any], dict[str, Module]]:
    """The weights with those that an adapter keeps whole in place, and the rest of the adapter."""
    saved = {path: m.value for path, m in adapter.items() if isinstance(m, Saved)}
    rest = {path: m for path, m in adapter.items() if path not in saved}
    if not saved:
        return weights, rest
    return replace_weights(weights, saved), rest


def replace_weights(weights: Mapping[str, Any], new: Mapping[str, Array]) -> dict[str, Any]:
    """The weights' tree with the ones at `new`'s paths replaced, each in the old one's type."""
    tree = dict(weights)
    for path, value in new.items():
        stack, name = where(weights, path)
        if stack is None:
            tree[name] = value.astype(weights.get(name, weights["embed"]).dtype)
        else:
            old = tree[stack]
            tree[stack] = {**old, name: value.astype(old[name].dtype)}
    return tree


def where(weights: Mapping[str, Any], path: str) -> tuple[str | None, str]:
    """The stack of layers that holds the weight or module at `path`, and its name there."""
    stack, _, name = path.partition(".")
    if isinstance(weights.get(stack), Mapping):
        return stack, name
    return ("layers", path) if path in weights.get("layers", {}) else (None, path)


def within(adapter: Adapter, layers: Mapping[str, Any], stack: str = "") -> dict[str, Module]:
    """The modules of an adapter at projections of one stack of layers, by their names there."""
    inside = {path.removeprefix(stack): m for path, m in adapter.items() if path.startswith(stack)}
    return {name: module for name, module in inside.items() if name in layers}


def walk(
    layer: Callable[[Array, Layer], Array],
    x: Array,
    weights: Mapping[str, Any],
    adapter: Adapter,
    *,
    pages: tuple[Array, Array] | None = None,
    used: Array | int = 0,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """x after every layer, by one scan over weights and modules stacked alike.

    Beside it "pages", the cached keys and values (N, B, S, K, C) with this pass's in them, and
    "observed", if there are any.
    """
    count = len(jax.tree.leaves(dict(weights))[0])
    xs: dict[str, Any] = {"number": jnp.arange(count), "weights": dict(weights)}
    xs["adapter"] = dict(adapter)
    if pages is not None:
        xs["pages"] = pages
    if dropout is not None:
        xs["dropout"] = Dropout(jax.random.split(dropout.key, count), dropout.rate)

    def step(x: Array, xs: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        out: dict[str, Any] = {}
        apply, look = _projector(xs, observe, out), _attender(xs.get("pages"), used, out)
        return layer(x, Layer(xs["number"], xs["weights"], apply, look)), out

    return jax.lax.scan(jax.checkpoint(step) if remat else step, x, xs)


def _projector(xs: dict[str, Any], observe: Observe | None, out: dict[str, Any]):
    """A function that applies a layer's projection by path, with its module and dropout."""
    weights, adapter, dropout = xs["weights"], xs["adapter"], xs.get("dropout")
    keys = {}
    if dropout is not None:
        split = jax.random.split(dropout.key, len(adapter))
        keys = {p: Dropout(k, dropout.rate) for p, k in zip(sorted(adapter), split, strict=True)}

    def apply(path: str, x: Array) -> Array:
        module = adapter.get(path)
        if observe is not None:
            out.setdefault("observed", {})[path] = observe(path, module, x)
        return project(x, weights[path], weights.get(f"{path}.bias"), module, keys.get(path))

    return apply


def _attender(pages: tuple[Array, Array] | None, used: Array | int, out: dict[str, Any]):
    """A function that attends, to the cached keys and values too if there is a cache."""

    def look(q: Array, k: Array, v: Array, mask: Array, **options: Any) -> Array:
        if pages is not None:
            k, v = (put(page, new, used) for page, new in zip(pages, (k, v), strict=True))
            out["pages"] = (k, v)
        return attend(q, k.astype(q.dtype), v.astype(q.dtype), mask, **options)

    return look

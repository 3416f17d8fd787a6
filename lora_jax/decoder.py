"""One forward pass, whatever the family: places, cache, modules and the walk over the layers.

A family says how a pass begins, what one layer does and how it ends; everything that a module, a
cache, dropout, observation or rematerialisation needs is done here, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.dora import gain
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, DoRA, LoRA, Module, PerExample, Saved
from lora_jax.parts import Cache, Memory, attend, attention_mask, put, whole_mask
from lora_jax.per_example import looked_up
from lora_jax.project import Dropout, project_all
from lora_jax.quantize import dense
from lora_jax.table import module_path

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
    longest: int = struct.field(pytree_node=False, default=0)  # every text's length, 0: unknown
    memory_segments: Array | None = None  # (B, S) of an encoded source

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

    def whole_mask(self) -> Array:
        """Which key (B, 1, T, S) each query may see where texts are read both ways."""
        return whole_mask(self.segments, self.key_segments)

    def memory_mask(self) -> Array:
        """Which place (B, 1, T, S) of the encoded source each query may see."""
        assert self.memory_segments is not None
        return whole_mask(self.segments, self.memory_segments)

    def ends(self) -> Array:
        """The last position (B, T) so far of each query's text; a shared prefix makes a row one."""
        same = self.segments[:, :, None] == self.key_segments[:, None, :]
        shared = jnp.any(self.key_segments < 0, axis=1)[:, None, None]
        real = self.key_segments[:, None, :] != 0
        at = jnp.broadcast_to(self.key_positions[:, None, :], same.shape)
        return jnp.max(at, axis=2, where=(same | shared) & real, initial=0)


@dataclass(frozen=True)
class Layer:
    """One layer as its family's code sees it."""

    number: Array  # (), counted from 0
    weights: Mapping[str, Array]  # this layer's weights, by path
    project_all: Callable[[Sequence[str], Array], list[Array]]  # projections of one input by path
    attend: Callable[..., Array]  # `parts.attend`, over the cached keys and values too
    recall: Callable[..., Array]  # `parts.attend` over this layer's memory of an encoded source
    keep: Callable[[str, Any], None]  # puts a value by name among what `walk` gives

    def project(self, path: str, x: Array) -> Array:
        """The projection (..., O) at a path for x (..., I), under its module."""
        return self.project_all([path], x)[0]


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
    memory: Memory | None = None,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> Output:
    """The final hidden states (B, T, D) of tokens (B, T); see `models.forward`."""
    weights, adapter = with_saved(weights, adapter)
    stack = "layers" if memory is None else "decoder"
    places = place(tokens, segments, positions, cache)
    if memory is not None:
        places = replace(places, memory_segments=memory.segments)
    x = embed(weights["embed"], tokens, adapter.get("embed"))
    x, shared = family.begin(config, weights, x, places)
    x, out = walk(
        partial(family.layer, config, shared),
        x,
        weights[stack],
        within(adapter, weights, stack),
        pages=None if cache is None else (cache.keys, cache.values),
        memory=None if memory is None else (memory.keys, memory.values),
        used=places.used,
        dropout=dropout,
        observe=observe,
        remat=remat,
    )
    if cache is not None:
        keys, values = out["pages"]
        index = (places.key_segments, places.key_positions)
        cache = Cache(keys, values, *index, cache.used + tokens.shape[1])
    observed = named(out["observed"], stack) if "observed" in out else None
    return Output(family.finish(config, weights, x), cache, observed)


def place(
    tokens: Array, segments: Array | None, positions: Array | None, cache: Cache | None
) -> Places:
    """The places of tokens (B, T): if unsaid, one segment a row, positions counted in each text."""
    longest = tokens.shape[1] if segments is None and positions is None else 0
    if segments is None:
        segments = jnp.ones_like(tokens)
    used, key_segments = 0, segments
    if cache is not None:
        used, key_segments = cache.used, put(cache.segments, segments, cache.used)
    if positions is None:  # a token sees what comes before it in its text, and itself
        seen = attention_mask(segments, segments, key_segments, key_segments, used)
        positions = jnp.maximum(jnp.sum(seen, axis=(1, 3), dtype=jnp.int32) - 1, 0)
    key_positions = positions if cache is None else put(cache.positions, positions, used)
    return Places(segments, positions, key_segments, key_positions, used, longest)


def learned_positions(table: Array, places: Places, first: int = 0) -> Array:
    """The embeddings (B, T, D) of the places' positions, the first of which is the row `first`.

    A position that was never learned is refused where the length of the texts is known; where only
    the data tell, it turns its row's states to NaN, so that nothing comes of them.
    """
    if places.longest > (count := len(table) - first):
        raise InputError(
            f"a text of {places.longest} tokens: this base model has learned {count} positions; "
            f"shorten it"
        )
    at = jnp.where(places.segments == 0, 0, places.positions) + first
    return table.at[at].get(mode="fill", fill_value=jnp.nan)


def embed(kernel: Array, tokens: Array, module: Module | None) -> Array:
    """The embeddings (..., D) of tokens (...), under a LoRA or DoRA of the embedding."""
    x = kernel[tokens]
    if isinstance(module, PerExample):
        return x + looked_up(module, tokens).astype(x.dtype)
    if isinstance(module, LoRA | DoRA):
        x = x + (module.scale * module.a[tokens] @ module.b).astype(x.dtype)
    return x * gain(kernel, module).astype(x.dtype) if isinstance(module, DoRA) else x


def with_saved(
    weights: Mapping[str, Any], adapter: Adapter
) -> tuple[Mapping[str, Any], dict[str, Module]]:
    """The weights with those that an adapter keeps whole in place, and the rest of the adapter."""
    saved = {path: whole(weights, path, m) for path, m in adapter.items() if isinstance(m, Saved)}
    rest = {path: m for path, m in adapter.items() if path not in saved}
    if not saved:
        return weights, rest
    return replace_weights(weights, saved), rest


def whole(weights: Mapping[str, Any], path: str, module: Saved) -> Array:
    """The weight at `path` under a module that keeps it, or a share of it, whole."""
    if module.share is None:
        return module.value
    stack, name = where(weights, path)
    inside = weights if stack is None else weights[stack]
    base = weights["embed"].T if path == "unembed" and path not in weights else inside[name]
    return module.value + (1 - module.share) * dense(base, module.value.dtype)


def replace_weights(weights: Mapping[str, Any], new: Mapping[str, Array]) -> dict[str, Any]:
    """The weights' tree with the ones at `new`'s paths replaced, each in the old one's type."""
    tree = dict(weights)
    for path, value in new.items():
        stack, name = where(weights, path)
        if stack is None:
            tree[name] = value.astype(weights.get(name, weights["embed"]).dtype)
        else:
            old = tree[stack]
            dtype = getattr(old[name], "dtype", weights["embed"].dtype)  # a quantized one has none
            tree[stack] = {**old, name: value.astype(dtype)}
    return tree


def where(weights: Mapping[str, Any], path: str) -> tuple[str | None, str]:
    """The stack of layers that holds the weight or module at `path`, and its name there."""
    stack, _, name = path.partition(".")
    if isinstance(weights.get(stack), Mapping):
        return stack, name
    return ("layers", path) if path in weights.get("layers", {}) else (None, path)


def within(adapter: Adapter, weights: Mapping[str, Any], stack: str) -> dict[str, Module]:
    """The modules of an adapter at projections of one stack of layers, by their names there."""
    found = {path: where(weights, path) for path in adapter}
    return {name: adapter[path] for path, (inside, name) in found.items() if inside == stack}


def named(observed: Mapping[str, Any], stack: str) -> dict[str, Any]:
    """What was observed in a stack of layers, by the paths that modules have."""
    return {module_path(f"{stack}.{name}"): value for name, value in observed.items()}


def walk(
    layer: Callable[[Array, Layer], Array],
    x: Array,
    weights: Mapping[str, Any],
    adapter: Adapter,
    *,
    pages: tuple[Array, Array] | None = None,
    used: Array | int = 0,
    memory: tuple[Array, Array] | None = None,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """x after every layer, by one scan over weights and modules stacked alike.

    Beside it "pages", the cached keys and values (N, B, S, K, C) with this pass's in them, and
    "observed", if there are any, and what layers keep, stacked.
    """
    count = len(jax.tree.leaves(dict(weights))[0])
    xs: dict[str, Any] = {"number": jnp.arange(count), "weights": dict(weights)}
    xs["adapter"] = dict(adapter)
    if pages is not None:
        xs["pages"] = pages
    if memory is not None:
        xs["memory"] = memory
    if dropout is not None:
        xs["dropout"] = Dropout(jax.random.split(dropout.key, count), dropout.rate)

    def step(x: Array, xs: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """x after one layer, and what that layer leaves, as `scan` stacks it."""
        out: dict[str, Any] = {}
        apply, look = _projector(xs, observe, out), _attender(xs.get("pages"), used, out)
        keep = out.__setitem__
        recall = partial(_recall, xs.get("memory"))
        return layer(x, Layer(xs["number"], xs["weights"], apply, look, recall, keep)), out

    return jax.lax.scan(jax.checkpoint(step) if remat else step, x, xs)


def _projector(xs: dict[str, Any], observe: Observe | None, out: dict[str, Any]):
    """A function that applies a layer's projections by path, with their modules and dropout."""
    weights, adapter, dropout = xs["weights"], xs["adapter"], xs.get("dropout")
    keys = {}
    if dropout is not None:
        split = jax.random.split(dropout.key, len(adapter))
        keys = {p: Dropout(k, dropout.rate) for p, k in zip(sorted(adapter), split, strict=True)}

    def apply_all(paths: Sequence[str], x: Array) -> list[Array]:
        """The projections at paths, once their observer has seen their input."""
        modules = [adapter.get(path) for path in paths]
        if observe is not None:
            seen = out.setdefault("observed", {})
            seen |= {path: observe(path, adapter.get(path), x) for path in paths}
        kernels = [weights[path] for path in paths]
        biases = [weights.get(f"{path}.bias") for path in paths]
        return project_all(x, kernels, biases, modules, [keys.get(path) for path in paths])

    return apply_all


def _attender(pages: tuple[Array, Array] | None, used: Array | int, out: dict[str, Any]):
    """A function that attends, to the cached keys and values too if there is a cache."""

    def look(q: Array, k: Array, v: Array, mask: Array, **options: Any) -> Array:
        """What queries find among keys; the new ones are put into the cache first."""
        if pages is not None:
            k, v = (put(page, new, used) for page, new in zip(pages, (k, v), strict=True))
            out["pages"] = (k, v)
        return attend(q, k.astype(q.dtype), v.astype(q.dtype), mask, **options)

    return look


def _recall(memory: Any, q: Array, mask: Array, **options: Any) -> Array:
    """Attention of q to the keys and values of a source."""
    keys, values = memory
    return attend(q, keys, values, mask, **options)

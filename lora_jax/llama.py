"""The Llama family: LLaMA, SmolLM2, Mistral, Qwen2. Pure functions over stacked weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, Module
from lora_jax.parts import Cache, attend, attention_mask, put, rms_norm, rope_tables, rotate
from lora_jax.project import Dropout, project
from lora_jax.table import Leaf

Array = jax.Array
Observe = Callable[[str, Module | None, Array], Any]


@dataclass(frozen=True)
class Config:
    """What fixes a Llama-family model's shape and arithmetic."""

    kind: str  # Hugging Face's model_type
    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    rope_base: float = 10_000.0
    eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # attention reaches this many positions back


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = raw["model_type"]
    problems = [f"{key} is missing" for key in _NEEDED if key not in raw]
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        problems.append(f"rope scaling {rope!r} is not supported yet")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported (silu is)")
    window = _window(raw)
    if window is not None and kind == "qwen2" and raw.get("max_window_layers", 28) != 0:
        problems.append("a sliding window on some layers only (max_window_layers) is not supported")
    refuse_all(problems, where)
    heads = raw["num_attention_heads"]
    bias = raw.get("attention_bias", False)
    return Config(
        kind=kind,
        vocabulary=raw["vocab_size"],
        width=raw["hidden_size"],
        hidden=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_width=raw.get("head_dim") or raw["hidden_size"] // heads,
        context=raw.get("max_position_embeddings", 2048),
        rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        eps=raw.get("rms_norm_eps", 1e-6),
        tied=raw.get("tie_word_embeddings", False),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=raw.get("mlp_bias", False),
        window=window,
    )


def _window(raw: Mapping[str, Any]) -> int | None:
    """The attention window, with transformers' defaults where the config is silent."""
    if raw["model_type"] == "mistral":
        return raw.get("sliding_window", 4096)
    return raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    raw = {
        "architectures": [f"{_CLASSES[config.kind]}ForCausalLM"],
        "model_type": config.kind,
        "hidden_act": "silu",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "sliding_window": config.window,
    }
    if config.kind == "llama":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.kind == "qwen2":
        raw |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    return raw


def projections(config: Config) -> dict[str, tuple[int, int]]:
    """Every projection of a layer that a module can change, with its (in, out) sizes."""
    d, f = config.width, config.hidden
    h, k = config.heads * config.head_width, config.kv_heads * config.head_width
    return {
        "self_attn.q_proj": (d, h),
        "self_attn.k_proj": (d, k),
        "self_attn.v_proj": (d, k),
        "self_attn.o_proj": (h, d),
        "mlp.gate_proj": (d, f),
        "mlp.up_proj": (d, f),
        "mlp.down_proj": (f, d),
    }


_AXES = {
    "q_proj": "DH",
    "k_proj": "DK",
    "v_proj": "DK",
    "o_proj": "HD",
    "gate_proj": "DF",
    "up_proj": "DF",
    "down_proj": "FD",
}


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table."""
    n, d, v = config.layers, config.width, config.vocabulary
    leaves = {"embed": Leaf("VD", (v, d), "model.embed_tokens.weight")}
    biased = {p for p in ("q_proj", "k_proj", "v_proj") if config.qkv_bias}
    biased |= {"o_proj"} if config.output_bias else set()
    biased |= {"gate_proj", "up_proj", "down_proj"} if config.mlp_bias else set()
    for path, (i, o) in projections(config).items():
        last = path.rsplit(".", 1)[-1]
        name, axes = f"model.layers.{{n}}.{path}", _AXES[last]
        leaves[f"layers.{path}"] = Leaf("N" + axes, (n, i, o), f"{name}.weight", transposed=True)
        if last in biased:
            leaves[f"layers.{path}.bias"] = Leaf("N" + axes[1], (n, o), f"{name}.bias")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.{{n}}.{norm}.weight"
        leaves[f"layers.{norm}"] = Leaf("ND", (n, d), name, norm=True)
    leaves["norm"] = Leaf("D", (d,), "model.norm.weight", norm=True)
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
    return leaves


@struct.dataclass
class Output:
    """What a forward pass gives."""

    hidden: Array  # (B, T, D), after the last norm
    cache: Cache | None = None  # the cache given, with this pass's positions in it
    observed: Any = None  # what `observe` returned, by projection, each leaf with a layer axis


def forward(
    config: Config,
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
    """The final hidden states (B, T, D) of tokens (B, T) under a module (an empty dict is none).

    `segments` (B, T) keeps packed texts apart; 0 marks padding. `positions` (B, T) count within a
    text; by default from 0, or from the cached end of each row. `observe(path, module, x)` may look
    at every projection's input; what it returns comes back stacked over layers. `remat` recomputes
    a layer in the backward pass instead of keeping its activations.
    """
    check_adapter(config, adapter)
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        positions = _next_positions(segments, cache)
    keys_at = _key_index(segments, positions, cache)
    used = 0 if cache is None else cache.used
    mask = attention_mask(segments, positions, *keys_at, used, config.window)
    rope = rope_tables(positions, config.head_width, config.rope_base)

    def layer(x: Array, xs: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        return _layer(config, x, xs, rope, mask, used, observe)

    xs: dict[str, Any] = {"weights": weights["layers"], "adapter": dict(adapter)}
    if cache is not None:
        xs["pages"] = (cache.keys, cache.values)
    if dropout is not None:
        xs["dropout"] = Dropout(jax.random.split(dropout.key, config.layers), dropout.rate)
    x, ys = jax.lax.scan(jax.checkpoint(layer) if remat else layer, weights["embed"][tokens], xs)
    if cache is not None:
        keys, values = ys["pages"]
        cache = Cache(keys, values, *keys_at, cache.used + tokens.shape[1])
    hidden = rms_norm(x, weights["norm"], config.eps)
    return Output(hidden, cache, ys.get("observed"))


def check_adapter(config: Config, adapter: Adapter) -> None:
    """Refuses an adapter with a module that this model has no projection for."""
    lost = [path for path in adapter if path not in projections(config)]
    if lost:
        known = ", ".join(projections(config))
        raise InputError(f"no projection {', '.join(lost)} for a module; this model has {known}")


def _next_positions(segments: Array, cache: Cache | None) -> Array:
    """Positions that count each row's own tokens, padding apart, on from what is cached."""
    real = (segments != 0).astype(jnp.int32)
    start = 0 if cache is None else jnp.sum(cache.segments != 0, axis=1, keepdims=True)
    return jnp.maximum(start + jnp.cumsum(real, axis=1) - 1, 0)


def _key_index(segments: Array, positions: Array, cache: Cache | None) -> tuple[Array, Array]:
    """Segments and positions (B, S) of every key the pass can see."""
    if cache is None:
        return segments, positions
    seen = put(cache.segments, segments, cache.used)
    return seen, put(cache.positions, positions, cache.used)


def _layer(config, x, xs, rope, mask, used, observe) -> tuple[Array, dict[str, Any]]:
    """One transformer layer: attention and a gated feed-forward, each normed and added."""
    weights, out = xs["weights"], {}
    apply = _projector(xs, observe, out)

    h = rms_norm(x, weights["input_layernorm"], config.eps)
    q, k, v = (_heads(apply(f"self_attn.{p}_proj", h), config) for p in "qkv")
    q, k = rotate(q, rope), rotate(k, rope)
    if "pages" in xs:
        k, v = (put(page, new, used) for page, new in zip(xs["pages"], (k, v), strict=True))
        out["pages"] = (k, v)
    mixed = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask)
    x = x + apply("self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))

    h = rms_norm(x, weights["post_attention_layernorm"], config.eps)
    gated = jax.nn.silu(apply("mlp.gate_proj", h)) * apply("mlp.up_proj", h)
    return x + apply("mlp.down_proj", gated), out


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


def _heads(x: Array, config: Config) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)


def unembed(config: Config, weights: Mapping[str, Any], hidden: Array) -> Array:
    """Logits (..., V) of hidden states (..., D), in the compute type."""
    return hidden @ unembedding(config, weights).astype(hidden.dtype)


def unembedding(config: Config, weights: Mapping[str, Any]) -> Array:
    """The kernel (D, V) that turns hidden states into logits."""
    return weights["embed"].T if config.tied else weights["unembed"]

"""The Llama family: LLaMA, SmolLM2, Mistral, Qwen2. Pure functions over stacked weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.decoder import Layer, Places
from lora_jax.errors import refuse_all
from lora_jax.parts import rms_norm, rope_tables, rotate
from lora_jax.table import Leaf

Array = jax.Array
Weights = Mapping[str, Any]

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = "model."
SPARE = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")

# What LoRA changes unless told, and which projections IA3 rescales, on which side: in PEFT's
# layout, and in the PEM paper's (keys, values and the intermediate activation).
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
IA3_LAYOUTS = {
    "peft": {"self_attn.k_proj": "output", "self_attn.v_proj": "output", "mlp.down_proj": "input"},
    "pem": {"self_attn.k_proj": "output", "self_attn.v_proj": "output", "mlp.up_proj": "output"},
}


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


def _kernels(config: Config) -> dict[str, tuple[int, int]]:
    """A layer's projections, with their (in, out) sizes."""
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
    for path, (i, o) in _kernels(config).items():
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


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and what all layers share: the attention mask and rotary tables."""
    rope = rope_tables(places.positions, config.head_width, config.rope_base)
    return x, (places.mask(config.window), rope)


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a gated feed-forward, each normed and added."""
    mask, rope = shared
    h = rms_norm(x, step.weights["input_layernorm"], config.eps)
    q, k, v = (_heads(step.project(f"self_attn.{p}_proj", h), config) for p in "qkv")
    mixed = step.attend(rotate(q, rope), rotate(k, rope), v, mask)
    x = x + step.project("self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))

    h = rms_norm(x, step.weights["post_attention_layernorm"], config.eps)
    gated = jax.nn.silu(step.project("mlp.gate_proj", h)) * step.project("mlp.up_proj", h)
    return x + step.project("mlp.down_proj", gated)


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return rms_norm(x, weights["norm"], config.eps)


def _heads(x: Array, config: Config) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)

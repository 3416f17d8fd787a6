"""The Llama family: LLaMA, SmolLM2, Mistral, Qwen2, Qwen3. Pure functions over stacked weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import rope
from lora_jax.decoder import Layer, Places
from lora_jax.fields import FULL, SLIDING, Fields
from lora_jax.parts import rms_norm, rotate
from lora_jax.table import Leaf

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "causal"

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
    rope: rope.Rope
    eps: float = 1e-6
    tied: bool = False  # the unembedding is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normed, head by head
    window: int | None = None  # attention reaches this many positions back
    unwindowed: tuple[int, ...] = ()  # but in these layers


_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# What transformers takes where a config is silent.
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    kind = raw["model_type"]
    fields = Fields({**_DEFAULTS[kind], **raw}, where)
    read = fields.sizes()
    fields.one_of("hidden_act", ["silu"])
    bias = fields.flag("attention_bias", False) and kind in ("llama", "qwen3")
    read |= {
        "eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", False),
        "mlp_bias": fields.flag("mlp_bias", False) and kind == "llama",
    }
    window, unwindowed = _window(fields, kind, read["layers"])
    fields.refuse(rope.problems(fields.raw))
    return Config(
        kind=kind,
        rope=rope.from_huggingface(fields.raw, read["head_width"]),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        qk_norm=kind == "qwen3",
        window=window,
        unwindowed=unwindowed,
        **read,
    )


def _window(fields: Fields, kind: str, count: int) -> tuple[int | None, tuple[int, ...]]:
    """The attention window, and the layers that attend without it."""
    types, window = fields.layer_types(count), fields.optional("sliding_window")
    if kind == "mistral":
        return window, ()
    if kind == "llama" or not fields.flag("use_sliding_window", False) or window is None:
        return None, ()
    first = fields.whole("max_window_layers", least=0)
    types = types or [FULL if n < first else SLIDING for n in range(count)]
    unwindowed = tuple(n for n, one in enumerate(types) if one == FULL)
    return (window, unwindowed) if len(unwindowed) < count else (None, ())


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
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "sliding_window": config.window,
        **rope.to_huggingface(config.rope, config.head_width),
    }
    if config.kind in ("llama", "qwen3"):
        raw["attention_bias"] = config.output_bias
    if config.kind == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.kind in ("qwen2", "qwen3"):
        free = [n in config.unwindowed or config.window is None for n in range(config.layers)]
        raw |= {
            "use_sliding_window": config.window is not None,
            "max_window_layers": sum(free),
            "layer_types": [FULL if one else SLIDING for one in free],
        }
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
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), ("ND", (n, d)))
    if config.qk_norm:
        heads = ("NC", (n, config.head_width))
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), heads)
    for norm, (axes, shape) in norms.items():
        name = f"model.layers.{{n}}.{norm}.weight"
        leaves[f"layers.{norm}"] = Leaf(axes, shape, name, norm=True)
    leaves["norm"] = Leaf("D", (d,), "model.norm.weight", norm=True)
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
    return leaves


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and what all layers share: attention masks and rotary tables."""
    near = places.mask(config.window)
    far = places.mask() if config.unwindowed else near
    return x, (near, far, rope.tables(config.rope, places.positions, places.ends()))


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a gated feed-forward, each normed and added."""
    mask, far, turn = shared
    if config.unwindowed:
        mask = jnp.where(jnp.isin(step.number, jnp.array(config.unwindowed)), far, mask)
    h = rms_norm(x, step.weights["input_layernorm"], config.eps)
    together = step.project_all([f"self_attn.{p}_proj" for p in "qkv"], h)
    q, k, v = (_heads(y, config) for y in together)
    if config.qk_norm:
        q = rms_norm(q, step.weights["self_attn.q_norm"], config.eps)
        k = rms_norm(k, step.weights["self_attn.k_norm"], config.eps)
    mixed = step.attend(rotate(q, turn), rotate(k, turn), v, mask)
    x = x + step.project("self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))

    h = rms_norm(x, step.weights["post_attention_layernorm"], config.eps)
    gate, up = step.project_all(["mlp.gate_proj", "mlp.up_proj"], h)
    return x + step.project("mlp.down_proj", jax.nn.silu(gate) * up)


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return rms_norm(x, weights["norm"], config.eps)


def _heads(x: Array, config: Config) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)

"""The Phi-3 family: Phi-3, Phi-3.5 and Phi-4 (mini too), whose projections are fused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import rope
from lora_jax.decoder import Layer, Places
from lora_jax.fields import Fields
from lora_jax.parts import rms_norm, rotate
from lora_jax.table import Leaf

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "causal"

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = "model."
SPARE = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")

# A module changes a fused projection as one, as in PEFT and in the GenKnowSub paper. PEFT names no
# IA3 targets for Phi-3; its layout for Llama, on what there is, rescales the queries too. The PEM
# paper's, keys and values without the queries, has no place on a fused projection's output.
TARGETS = ("self_attn.qkv_proj", "self_attn.o_proj")
IA3_LAYOUTS = {"peft": {"self_attn.qkv_proj": "output", "mlp.down_proj": "input"}}


@dataclass(frozen=True)
class Config:
    """What fixes a Phi-3 model's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    rope: rope.Rope
    eps: float = 1e-5
    tied: bool = False  # the unembedding is the embedding
    window: int | None = None  # attention reaches this many positions back


_DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    fields = Fields(_renamed({**_DEFAULTS, **raw}), where)
    read = fields.sizes() | {
        "eps": fields.number("rms_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "window": fields.optional("sliding_window"),
    }
    fields.one_of("hidden_act", ["silu"])
    fields.refuse(rope.problems(fields.raw))
    return Config(rope=rope.from_huggingface(fields.raw, read["head_width"]), **read)


def _renamed(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with longrope by that name, where an early Phi-3 calls it "su" or "yarn"."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    known = isinstance(given, Mapping)
    if not known or given.get("rope_type", given.get("type")) not in ("su", "yarn"):
        return raw
    return {**raw, "rope_scaling": {**given, "rope_type": "longrope"}}


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "original_max_position_embeddings": config.rope.context or config.context,
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "sliding_window": config.window,
        "pad_token_id": None,  # transformers' default, 32000, is not in every vocabulary
        **rope.to_huggingface(config.rope, config.head_width),
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table."""
    n, d, f, v = config.layers, config.width, config.hidden, config.vocabulary
    h, k = config.heads * config.head_width, config.kv_heads * config.head_width
    leaves = {"embed": Leaf("VD", (v, d), "model.embed_tokens.weight")}
    for path, axes, shape in (
        ("self_attn.qkv_proj", "NDH", (n, d, h + 2 * k)),
        ("self_attn.o_proj", "NHD", (n, h, d)),
        ("mlp.gate_up_proj", "NDF", (n, d, 2 * f)),
        ("mlp.down_proj", "NFD", (n, f, d)),
    ):
        name = f"model.layers.{{n}}.{path}.weight"
        leaves[f"layers.{path}"] = Leaf(axes, shape, name, transposed=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.{{n}}.{norm}.weight"
        leaves[f"layers.{norm}"] = Leaf("ND", (n, d), name, norm=True)
    leaves["norm"] = Leaf("D", (d,), "model.norm.weight", norm=True)
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
    return leaves


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and what all layers share: the attention mask and rotary tables."""
    turn = rope.tables(config.rope, places.positions, places.ends())
    return x, (places.mask(config.window), turn)


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a gated feed-forward, each normed and added."""
    mask, turn = shared
    h = rms_norm(x, step.weights["input_layernorm"], config.eps)
    heads = step.project("self_attn.qkv_proj", h).reshape(*x.shape[:-1], -1, config.head_width)
    q, k, v = jnp.split(heads, [config.heads, config.heads + config.kv_heads], axis=-2)
    mixed = step.attend(rotate(q, turn), rotate(k, turn), v, mask)
    x = x + step.project("self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))

    h = rms_norm(x, step.weights["post_attention_layernorm"], config.eps)
    gate, up = jnp.split(step.project("mlp.gate_up_proj", h), 2, axis=-1)
    return x + step.project("mlp.down_proj", jax.nn.silu(gate) * up)


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return rms_norm(x, weights["norm"], config.eps)

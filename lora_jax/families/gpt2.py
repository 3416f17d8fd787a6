"""The GPT-2 family: learned positions, LayerNorm, queries, keys and values from one projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.activations import ACTIVATIONS
from lora_jax.decoder import Layer, Places, learned_positions
from lora_jax.fields import Fields
from lora_jax.parts import layer_norm
from lora_jax.table import Leaf, biased

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "causal"

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = "transformer."
SPARE = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight")

# As PEFT has them. In the PEM paper's layout the keys, the values and, before its activation, the
# intermediate are rescaled; queries come along, for which this does what it does for the keys.
TARGETS = ("attn.c_attn",)
IA3_LAYOUTS = {
    "peft": {"attn.c_attn": "output", "mlp.c_proj": "input"},
    "pem": {"attn.c_attn": "output", "mlp.c_fc": "output"},
}


@dataclass(frozen=True)
class Config:
    """What fixes a GPT-2 model's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    context: int  # positions that were learned; there are no others
    activation: str = "gelu_new"
    eps: float = 1e-5
    tied: bool = True  # the unembedding is the embedding
    scaled: bool = True  # attention's logits are over the root of the head width
    scaled_by_layer: bool = False  # and over the layer's number, counted from 1

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.heads

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.width // self.heads


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    fields = Fields(raw, where)
    fields.one_of("add_cross_attention", [False, None])
    width, heads = fields.heads("n_embd", "n_head")
    config = Config(
        vocabulary=fields.whole("vocab_size"),
        width=width,
        hidden=fields.optional("n_inner") or 4 * width,
        layers=fields.whole("n_layer"),
        heads=heads,
        context=fields.whole("n_positions"),
        activation=fields.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        eps=fields.number("layer_norm_epsilon", 1e-5),
        tied=fields.flag("tie_word_embeddings", True),
        scaled=fields.flag("scale_attn_weights", True),
        scaled_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
    )
    fields.refuse()
    return config


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": config.activation,
        "vocab_size": config.vocabulary,
        "n_embd": config.width,
        "n_inner": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        "scale_attn_weights": config.scaled,
        "scale_attn_by_inverse_layer_idx": config.scaled_by_layer,
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table; checkpoints store these kernels (in, out), as they are here."""
    n, d, f, v = config.layers, config.width, config.hidden, config.vocabulary
    leaves = {
        "embed": Leaf("VD", (v, d), "transformer.wte.weight"),
        "positions": Leaf("TD", (config.context, d), "transformer.wpe.weight"),
    }
    for path, axes, shape in (
        ("ln_1", "ND", (n, d)),
        ("attn.c_attn", "NDH", (n, d, 3 * d)),
        ("attn.c_proj", "NHD", (n, d, d)),
        ("ln_2", "ND", (n, d)),
        ("mlp.c_fc", "NDF", (n, d, f)),
        ("mlp.c_proj", "NFD", (n, f, d)),
    ):
        name = f"transformer.h.{{n}}.{path}.weight"
        leaves |= biased(f"layers.{path}", Leaf(axes, shape, name, norm=len(shape) == 2))
    leaves |= biased("norm", Leaf("D", (d,), "transformer.ln_f.weight", norm=True))
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
    return leaves


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and the attention mask, which all layers share."""
    return x + learned_positions(weights["positions"], places), places.mask()


def layer(config: Config, mask: Array, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a feed-forward, each normed before and added."""
    h = layer_norm(x, step.weights["ln_1"], step.weights["ln_1.bias"], config.eps)
    fused = jnp.split(step.project("attn.c_attn", h), 3, axis=-1)
    q, k, v = (part.reshape(*x.shape[:-1], config.heads, -1) for part in fused)
    if config.scaled_by_layer:
        q = q / (step.number + 1)
    mixed = step.attend(q, k, v, mask, scale=None if config.scaled else 1.0)
    x = x + step.project("attn.c_proj", mixed.reshape(x.shape))

    h = layer_norm(x, step.weights["ln_2"], step.weights["ln_2.bias"], config.eps)
    h = ACTIVATIONS[config.activation](step.project("mlp.c_fc", h))
    return x + step.project("mlp.c_proj", h)


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return layer_norm(x, weights["norm"], weights["norm.bias"], config.eps)

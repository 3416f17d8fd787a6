"""The T5 family (v1.0, v1.1, Flan): an encoder, and a decoder that attends to what it read.

`decoder.forward` takes the decoder through `begin`, `layer` and `finish`; `encoder.encode` takes
the encoder through `begin_source`, `encoder_layer` and `finish_source`, and then every decoder
layer's `remember`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.activations import ACTIVATIONS
from lora_jax.decoder import Layer, Places
from lora_jax.fields import Fields
from lora_jax.parts import rms_norm
from lora_jax.table import Leaf

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "encoder-decoder"

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = ""
SPARE = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"lm_head\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)

TARGETS = ("q", "k", "v", "o")
_PARTS = {
    "encoder": ("SelfAttention", "DenseReluDense"),
    "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
}
_PATHS = [f"{stack}.layer.{n}.{p}" for stack, parts in _PARTS.items() for n, p in enumerate(parts)]
_KEYS_AND_VALUES = {f"{p}.{x}": "output" for p in _PATHS if "Attention" in p for x in "kv"}
_FEEDS = [path for path in _PATHS if "Dense" in path]
# wi or wi_1: `models.ia3_layouts` keeps the one that a model has.
IA3_LAYOUTS = {
    "peft": _KEYS_AND_VALUES | {f"{path}.wo": "input" for path in _FEEDS},
    "pem": _KEYS_AND_VALUES | {f"{path}.{x}": "output" for path in _FEEDS for x in ("wi", "wi_1")},
}


@dataclass(frozen=True)
class Config:
    """What fixes a T5 model's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    encoder_layers: int
    layers: int  # of the decoder
    heads: int
    head_width: int
    tied: bool = True  # the unembedding is the embedding
    shared: bool = False  # not tied, but a checkpoint that stores no unembedding means the same
    scaled: bool = True  # the decoder's states are scaled before they are unembedded
    activation: str = "relu"
    gated: bool = False
    buckets: int = 32  # of relative positions
    far: int = 128  # tokens apart from which all share a bucket
    eps: float = 1e-6
    decoder_start: int = 0  # the token that a decoder's text begins with
    padding: int = 0  # the token that pads texts

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.heads

    @property
    def context(self) -> int:
        """The most tokens a text may have: positions are relative, and set no limit."""
        return sys.maxsize


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    fields = Fields(raw, where)
    kind = fields.one_of("feed_forward_proj", [*ACTIVATIONS, *_GATED], "relu")
    tied, layers = fields.flag("tie_word_embeddings", True), fields.whole("num_layers")
    scaled = fields.flag("scale_decoder_outputs", tied)
    padding = fields.optional("pad_token_id", least=0) or 0
    start = fields.optional("decoder_start_token_id", least=0)
    buckets, far = _reach(fields)
    config = Config(
        vocabulary=fields.whole("vocab_size"),
        width=fields.whole("d_model"),
        hidden=fields.whole("d_ff"),
        encoder_layers=layers,
        layers=fields.optional("num_decoder_layers") or layers,
        heads=fields.whole("num_heads"),
        head_width=fields.whole("d_kv"),
        tied=tied and scaled,  # transformers 5 calls v1.1 tied as well, and mostly stores both
        shared=tied and not scaled,
        scaled=scaled,
        activation=_GATED.get(kind, kind),
        gated=kind in _GATED,
        buckets=buckets,
        far=far,
        eps=fields.number("layer_norm_epsilon", 1e-6),
        decoder_start=padding if start is None else start,
        padding=padding,
    )
    fields.refuse()
    return config


def _reach(fields: Fields) -> tuple[int, int]:
    """The buckets of relative positions, and from where on all share the last."""
    buckets = fields.whole("relative_attention_num_buckets", 32, least=4)
    far = fields.whole("relative_attention_max_distance", 128)
    told = f"relative_attention_max_distance {far} reaches no further than half of the {buckets}"
    fields.expect(far > buckets // 2, f"{told} buckets")
    return buckets, far


# Gated feed-forwards and their activations. T5 v1.1's "gelu" is the one by tanh.
_GATED = {f"gated-{name}": name for name in ACTIVATIONS} | {"gated-gelu": "gelu_new"}


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    activation = "gelu" if config.activation == "gelu_new" else config.activation
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "feed_forward_proj": f"gated-{activation}" if config.gated else config.activation,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.hidden,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.far,
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scaled,
        "decoder_start_token_id": config.decoder_start,
        "pad_token_id": config.padding,
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table; a path is the checkpoint's name without "block.N."."""
    d, v = config.width, config.vocabulary
    leaves = {"embed": Leaf("VD", (v, d), "shared.weight")}
    leaves |= _stack(config, "encoder", config.encoder_layers)
    leaves |= _stack(config, "decoder", config.layers)
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
        if config.shared:
            leaves["unembed"] = replace(leaves["unembed"], instead="shared.weight")
    return leaves


def _stack(config: Config, stack: str, count: int) -> dict[str, Leaf]:
    """The weights of the encoder or of the decoder."""
    d, leaves = config.width, {}
    for number, part in enumerate(_PARTS[stack]):
        name, path = f"{stack}.block.{{n}}.layer.{number}", f"{stack}.layer.{number}"
        for last, (axes, *size) in _kernels(config, part).items():
            leaf = Leaf("N" + axes, (count, *size), f"{name}.{part}.{last}.weight", transposed=True)
            leaves[f"{path}.{part}.{last}"] = leaf
        norm = Leaf("ND", (count, d), f"{name}.layer_norm.weight", norm=True)
        leaves[f"{path}.layer_norm"] = norm
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    leaves[f"{stack}_bias"] = Leaf("UH", (config.buckets, config.heads), bias)
    leaves[f"{stack}_norm"] = Leaf("D", (d,), f"{stack}.final_layer_norm.weight", norm=True)
    return leaves


def _kernels(config: Config, part: str) -> dict[str, tuple[str, int, int]]:
    """The projections of an attention or a feed-forward: their axes and (in, out) sizes."""
    d, f, h = config.width, config.hidden, config.heads * config.head_width
    if part != "DenseReluDense":
        return {"q": ("DH", d, h), "k": ("DK", d, h), "v": ("DK", d, h), "o": ("HD", h, d)}
    first = ("wi_0", "wi_1") if config.gated else ("wi",)
    return dict.fromkeys(first, ("DF", d, f)) | {"wo": ("FD", f, d)}


def begin_source(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The encoder's input, and what its layers share: the mask and the bias of relative positions.

    The bias goes by slot, as a text lies in one stretch; so one serves all rows.
    """
    slots = jnp.arange(x.shape[1])
    bias = _bias(config, weights["encoder_bias"], slots[None, None] - slots[:, None], True)
    return x, (places.whole_mask(), bias)


def encoder_layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One layer of the encoder: attention and a feed-forward, each normed before and added."""
    return _feed_forward(config, _self_attention(config, shared, x, step), step, "layer.1")


def finish_source(config: Config, weights: Weights, x: Array) -> Array:
    """What the encoder makes of a source, from its last layer's output."""
    return rms_norm(x, weights["encoder_norm"], config.eps)


def remember(config: Config, x: Array, step: Layer) -> tuple[Array, Array]:
    """The keys and values (B, S, K, C) that one decoder layer has of the encoded source."""
    together = step.project_all([f"layer.1.EncDecAttention.{p}" for p in "kv"], x)
    k, v = (_heads(config, y) for y in together)
    return k, v


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The decoder's input, and what its layers share: both masks and the bias between them."""
    apart = places.key_positions[:, None] - places.positions[:, :, None]
    bias = _bias(config, weights["decoder_bias"], apart, False)
    return x, (places.mask(), bias, places.memory_mask())


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One layer of the decoder: attention to itself and to the source, and a feed-forward."""
    mask, bias, memory_mask = shared
    x = _self_attention(config, (mask, bias), x, step)
    h = rms_norm(x, step.weights["layer.1.layer_norm"], config.eps)
    q = _heads(config, step.project("layer.1.EncDecAttention.q", h))
    mixed = step.recall(q, memory_mask, scale=1.0)
    x = x + step.project("layer.1.EncDecAttention.o", mixed.reshape(*x.shape[:-1], -1))
    return _feed_forward(config, x, step, "layer.2")


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    x = rms_norm(x, weights["decoder_norm"], config.eps)
    return x * config.width**-0.5 if config.scaled else x


def _self_attention(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    mask, bias = shared
    h = rms_norm(x, step.weights["layer.0.layer_norm"], config.eps)
    together = step.project_all([f"layer.0.SelfAttention.{p}" for p in "qkv"], h)
    q, k, v = (_heads(config, y) for y in together)
    mixed = step.attend(q, k, v, mask, scale=1.0, bias=bias)
    return x + step.project("layer.0.SelfAttention.o", mixed.reshape(*x.shape[:-1], -1))


def _feed_forward(config: Config, x: Array, step: Layer, path: str) -> Array:
    h = rms_norm(x, step.weights[f"{path}.layer_norm"], config.eps)
    path, activate = f"{path}.DenseReluDense", ACTIVATIONS[config.activation]
    if config.gated:
        gate, up = step.project_all([f"{path}.wi_0", f"{path}.wi_1"], h)
        h = activate(gate) * up
    else:
        h = activate(step.project(f"{path}.wi", h))
    return x + step.project(f"{path}.wo", h)


def _heads(config: Config, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], config.heads, config.head_width)


def _bias(config: Config, kernel: Array, apart: Array, both_ways: bool) -> Array:
    """What attention's logits gain (B, H, T, S) for keys that lie `apart` (B, T, S) from queries.

    Raffel et al., "Exploring the Limits of Transfer Learning", section 2.1. A decoder has buckets
    for what came before alone; an encoder has half of them for either side.
    """
    count = config.buckets // 2 if both_ways else config.buckets
    distance = jnp.abs(apart) if both_ways else jnp.maximum(-apart, 0)
    bucket = jnp.asarray(_buckets(count, config.far))[jnp.minimum(distance, config.far)]
    if both_ways:
        bucket = bucket + count * (apart > 0)
    return jnp.moveaxis(kernel[bucket], -1, 1)


@lru_cache
def _buckets(count: int, far: int) -> np.ndarray:
    """The bucket, of `count`, of each distance up to `far`: half exact, half by its logarithm."""
    exact, distance = count // 2, np.arange(far + 1)
    log = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(far / exact)
    far_off = exact + (log * (count - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far_off, count - 1))

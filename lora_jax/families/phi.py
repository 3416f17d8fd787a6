"""The Phi family (Phi-1, Phi-1.5, Phi-2): attention and feed-forward beside each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax import rope
from lora_jax.activations import ACTIVATIONS
from lora_jax.decoder import Layer, Places
from lora_jax.fields import Fields
from lora_jax.parts import layer_norm, rotate
from lora_jax.table import Leaf, biased

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "causal"

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = "model."
SPARE = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")

# LoRA changes what Arrow's and GenKnowSub's papers do. PEFT's IA3 rescales queries and values; the
# PEM paper's keys, values and, before its activation, the intermediate.
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense")
IA3_LAYOUTS = {
    "peft": {"self_attn.q_proj": "output", "self_attn.v_proj": "output", "mlp.fc2": "input"},
    "pem": {"self_attn.k_proj": "output", "self_attn.v_proj": "output", "mlp.fc1": "output"},
}


@dataclass(frozen=True)
class Config:
    """What fixes a Phi model's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rope: rope.Rope
    activation: str = "gelu_new"
    eps: float = 1e-5
    tied: bool = False  # the unembedding is the embedding
    qk_norm: bool = False  # queries and keys are normed, head by head

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.width // self.heads


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    raw = {"partial_rotary_factor": 0.5, "max_position_embeddings": 2048, **raw}
    fields = Fields(raw, where)
    width, heads = fields.heads("hidden_size", "num_attention_heads")
    read = fields.sizes() | {
        "activation": fields.one_of("hidden_act", ACTIVATIONS, "gelu_new"),
        "eps": fields.number("layer_norm_eps", 1e-5),
        "tied": fields.flag("tie_word_embeddings", False),
        "qk_norm": fields.flag("qk_layernorm", False),
    }
    own = read.pop("head_width")
    fields.expect(own == width // max(heads, 1), f"head_dim {own} is not hidden_size over heads")
    fields.refuse(rope.problems(raw))
    return Config(rope=rope.from_huggingface(raw, own), **read)


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    turns = rope.to_huggingface(config.rope, config.head_width)
    whole = {"partial_rotary_factor": 1.0} | turns["rope_parameters"]  # silence would mean a half
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_act": config.activation,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        **turns,
        "rope_parameters": whole,
        "layer_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "qk_layernorm": config.qk_norm,
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table."""
    n, d, f, v = config.layers, config.width, config.hidden, config.vocabulary
    c, k = config.head_width, config.kv_heads * config.head_width
    leaves = {"embed": Leaf("VD", (v, d), "model.embed_tokens.weight")}
    norms = {"input_layernorm": ("ND", (n, d))}
    if config.qk_norm:
        norms |= {f"self_attn.{x}_layernorm": ("NC", (n, c)) for x in "qk"}
    kernels = {
        "self_attn.q_proj": ("NDH", (n, d, d)),
        "self_attn.k_proj": ("NDK", (n, d, k)),
        "self_attn.v_proj": ("NDK", (n, d, k)),
        "self_attn.dense": ("NHD", (n, d, d)),
        "mlp.fc1": ("NDF", (n, d, f)),
        "mlp.fc2": ("NFD", (n, f, d)),
    }
    for path, (axes, shape) in (norms | kernels).items():
        name, norm = f"model.layers.{{n}}.{path}.weight", path in norms
        leaf = Leaf(axes, shape, name, transposed=not norm, norm=norm)
        leaves |= biased(f"layers.{path}", leaf)
    leaves |= biased("norm", Leaf("D", (d,), "model.final_layernorm.weight", norm=True))
    head = biased("unembed", Leaf("DV", (d, v), "lm_head.weight", transposed=True))
    if config.tied:
        del head["unembed"]
    return leaves | head


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The first layer's input, and what all layers share: the attention mask and rotary tables."""
    return x, (places.mask(), rope.tables(config.rope, places.positions, places.ends()))


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a feed-forward, both of the same normed input."""
    mask, turns = shared
    h = _normed("input_layernorm", x, config, step)
    together = step.project_all([f"self_attn.{p}_proj" for p in "qkv"], h)
    q, k, v = (_heads(y, config) for y in together)
    if config.qk_norm:
        q = _normed("self_attn.q_layernorm", q, config, step)
        k = _normed("self_attn.k_layernorm", k, config, step)
    mixed = step.attend(rotate(q, turns), rotate(k, turns), v, mask)
    attended = step.project("self_attn.dense", mixed.reshape(x.shape))
    inner = ACTIVATIONS[config.activation](step.project("mlp.fc1", h))
    return x + attended + step.project("mlp.fc2", inner)


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return layer_norm(x, weights["norm"], weights["norm.bias"], config.eps)


def _normed(path: str, x: Array, config: Config, step: Layer) -> Array:
    return layer_norm(x, step.weights[path], step.weights[f"{path}.bias"], config.eps)


def _heads(x: Array, config: Config) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)

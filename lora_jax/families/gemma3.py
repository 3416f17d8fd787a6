"""The Gemma 3 family, text only: local and global layers, norms before and after each part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import rope
from lora_jax.decoder import Layer, Places
from lora_jax.fields import FULL, SLIDING, Fields
from lora_jax.parts import rotate
from lora_jax.rope import Rope
from lora_jax.table import Leaf

Array = jax.Array
Weights = Mapping[str, Any]

KIND = "causal"

# What a checkpoint's names begin with, and the names that may be stored without being wanted.
PREFIX = "model."
SPARE = (r".*rotary_emb\..*inv_freq", r"lm_head\.weight")

# What LoRA changes unless told, and which projections IA3 rescales, on which side: in PEFT's
# layout, and in the PEM paper's (keys, values and the intermediate activation).
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
IA3_LAYOUTS = {
    "peft": {"self_attn.q_proj": "output", "self_attn.v_proj": "output", "mlp.down_proj": "input"},
    "pem": {"self_attn.k_proj": "output", "self_attn.v_proj": "output", "mlp.up_proj": "output"},
}


@dataclass(frozen=True)
class Config:
    """What fixes a Gemma 3 model's shape and arithmetic."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    local: tuple[bool, ...]  # for every layer, whether its attention has a window
    rope: Rope  # of the global layers
    local_rope: Rope
    window: int = 4096  # local attention reaches this many positions back
    query_scalar: float = 256  # queries are divided by its root
    eps: float = 1e-6
    tied: bool = True  # the unembedding is the embedding


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config that a Hugging Face `config.json` describes; what it asks in vain is named."""
    fields = Fields({"max_position_embeddings": 131_072, **raw}, where)
    for key, plain in _PLAIN.items():
        fields.one_of(key, dict.fromkeys([plain, None]))
    read = fields.sizes() | {
        "kv_heads": fields.whole("num_key_value_heads"),
        "head_width": fields.whole("head_dim"),
        "window": fields.whole("sliding_window", 4096),
        "query_scalar": fields.number("query_pre_attn_scalar", 256),
        "eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings", True),
        "local": _local(fields),
    }
    far, near = _ropes(fields)
    fields.refuse(rope.problems(far, ("default", "linear")) + rope.problems(near, ("default",)))
    turns = [rope.from_huggingface(one, read["head_width"]) for one in (far, near)]
    return Config(rope=turns[0], local_rope=turns[1], **read)


# Keys that change the arithmetic, and the one value that is implemented.
_PLAIN = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _ropes(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary keys of the global and of the local layers, each as a config of one kind has them.

    Configs of transformers 5 have both; older ones two bases, and a scaling of the global layers.
    """
    raw, both = fields.raw, Fields(fields.table("rope_parameters"), "", fields.problems)
    far = {"rope_theta": raw.get("rope_theta") or 1e6} | {**fields.table("rope_scaling")}
    near = {"rope_theta": raw.get("rope_local_base_freq") or 1e4}
    found = far | {**both.table(FULL)}, near | {**both.table(SLIDING)}
    return {"rope_parameters": found[0]}, {"rope_parameters": found[1]}


def _local(fields: Fields) -> tuple[bool, ...]:
    """Which layers are local: as listed, or all but every sixth (or whatever the pattern says)."""
    pattern, count = (
        fields.optional("sliding_window_pattern") or 6,
        fields.whole("num_hidden_layers"),
    )
    if listed := fields.layer_types(count):
        return tuple(kind == SLIDING for kind in listed)
    return tuple(bool((n + 1) % pattern) for n in range(count))


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` of this config, as transformers writes it."""
    far, near = (
        rope.to_huggingface(r, config.head_width) for r in (config.rope, config.local_rope)
    )
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "layer_types": [SLIDING if local else FULL for local in config.local],
        "sliding_window": config.window,
        "rope_parameters": {FULL: far["rope_parameters"], SLIDING: near["rope_parameters"]},
        "query_pre_attn_scalar": config.query_scalar,
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
    }


def table(config: Config) -> dict[str, Leaf]:
    """The family's weight table; a norm's weight is its gain less one, as checkpoints have it."""
    n, d, f, v = config.layers, config.width, config.hidden, config.vocabulary
    h, k = config.heads * config.head_width, config.kv_heads * config.head_width
    kernels = {
        "self_attn.q_proj": ("DH", (d, h)),
        "self_attn.k_proj": ("DK", (d, k)),
        "self_attn.v_proj": ("DK", (d, k)),
        "self_attn.o_proj": ("HD", (h, d)),
        "mlp.gate_proj": ("DF", (d, f)),
        "mlp.up_proj": ("DF", (d, f)),
        "mlp.down_proj": ("FD", (f, d)),
    }
    leaves = {"embed": Leaf("VD", (v, d), "model.embed_tokens.weight")}
    for path, (axes, sizes) in kernels.items():
        name = f"model.layers.{{n}}.{path}.weight"
        leaves[f"layers.{path}"] = Leaf("N" + axes, (n, *sizes), name, transposed=True)
    for path in _NORMS:
        heads = path.startswith("self_attn")
        axes, size = ("NC", config.head_width) if heads else ("ND", d)
        name = f"model.layers.{{n}}.{path}.weight"
        leaves[f"layers.{path}"] = Leaf(axes, (n, size), name, norm=True)
    leaves["norm"] = Leaf("D", (d,), "model.norm.weight", norm=True)
    if not config.tied:
        leaves["unembed"] = Leaf("DV", (d, v), "lm_head.weight", transposed=True)
    return leaves


_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)


def begin(config: Config, weights: Weights, x: Array, places: Places) -> tuple[Array, Any]:
    """The scaled embeddings, and what layers share: which are local, and a mask and rope of each.

    The scale is rounded to the compute type, as transformers has it.
    """
    ropes = [rope.tables(r, places.positions) for r in (config.rope, config.local_rope)]
    ropes = jax.tree.map(lambda *both: jnp.stack(both), *ropes)
    masks = jnp.stack([places.mask(), places.mask(config.window)])
    return x * jnp.asarray(config.width**0.5, x.dtype), (jnp.asarray(config.local), masks, ropes)


def layer(config: Config, shared: Any, x: Array, step: Layer) -> Array:
    """One transformer layer: attention and a gated feed-forward, normed before and after."""
    local, masks, ropes = shared
    kind = local[step.number].astype(int)
    mask, turns = jax.tree.map(lambda both: both[kind], (masks, ropes))

    def norm(x: Array, path: str) -> Array:
        return _norm(x, step.weights[path], config.eps)

    h = norm(x, "input_layernorm")
    together = step.project_all([f"self_attn.{p}_proj" for p in "qkv"], h)
    q, k, v = (_heads(y, config) for y in together)
    q, k = (rotate(norm(y, f"self_attn.{p}_norm"), turns) for p, y in (("q", q), ("k", k)))
    mixed = step.attend(q, k, v, mask, scale=config.query_scalar**-0.5)
    mixed = step.project("self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))
    x = x + norm(mixed, "post_attention_layernorm")

    h = norm(x, "pre_feedforward_layernorm")
    gate, up = step.project_all(["mlp.gate_proj", "mlp.up_proj"], h)
    fed = step.project("mlp.down_proj", jax.nn.gelu(gate, approximate=True) * up)
    return x + norm(fed, "post_feedforward_layernorm")


def finish(config: Config, weights: Weights, x: Array) -> Array:
    """The final hidden states from the last layer's output."""
    return _norm(x, weights["norm"], config.eps)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    """x (..., D) over its root mean square, times 1 + weight; all in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def _heads(x: Array, config: Config) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)

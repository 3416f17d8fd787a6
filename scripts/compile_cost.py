"""How long programs over a model take to compile, two layers deep and thirty-two.

The layers are one scan, so a deep model is no larger a program than a shallow one. Only shapes are
compiled: no weights are made.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models, table
from lora_jax.modules import init_lora
from scripts.timing import show
from train.config import Config
from train.loss import Batch, Source
from train.step import make_programs

Lower = Callable[[models.Config], jax.stages.Lowered]

DEPTHS = (2, 32)
ROWS, LENGTH, LABELS = 8, 128, 64

# One model in the words of every family's config.json.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 256),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    "vocab_size": 4096,
}


def compiling(rounds: int) -> None:
    """Prints what every family takes for a forward pass and for a LoRA's training step."""
    kinds = {file: kind for kind, file in reversed(models.FAMILIES.items())}  # each file's first
    programs = {"forward pass": forward, "training step": training_step}
    for lower in programs.values():  # the compiler itself has to start
        compile_seconds(lower, model("llama", 2))
    for title, lower in programs.items():
        rows = []
        for kind in [*kinds.values()][::-1]:
            shallow, deep = fastest(lower, [model(kind, depth) for depth in DEPTHS], rounds)
            rows.append([kind, f"{shallow:.2f} s", f"{deep:.2f} s", f"{deep / shallow:.2f}x"])
        what = f"Compiling a {title} under a LoRA ({ROWS}x{LENGTH} tokens), tracing included"
        show(what, ["family", *(f"{depth} layers" for depth in DEPTHS), "ratio"], rows)


def fastest(lower: Lower, configs: list[models.Config], rounds: int) -> list[float]:
    """The least seconds that each model takes to compile, all of them in turn every round."""
    times = [[compile_seconds(lower, config) for config in configs] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def model(kind: str, layers: int) -> models.Config:
    """A small model of a family (Hugging Face's model_type), as many layers deep."""
    depth = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), layers)
    return models.config_from_huggingface(SIZES | depth | {"model_type": kind})


def compile_seconds(lower: Lower, config: models.Config) -> float:
    """The seconds from a model's shapes to a compiled program."""
    began = time.perf_counter()
    lower(config).compile()
    return time.perf_counter() - began


def forward(config: models.Config) -> jax.stages.Lowered:
    """A forward pass under a LoRA, before it is compiled."""

    def run(weights: Any, adapter: Any, tokens: jax.Array) -> jax.Array:
        """The hidden states of tokens; an encoder-decoder reads them as its source too."""
        reads = models.kind(config) == "encoder-decoder"
        memory = models.encode(config, weights, adapter, tokens) if reads else None
        return models.forward(config, weights, adapter, tokens, memory=memory).hidden

    weights, adapter = abstract_base(config), jax.eval_shape(lambda: first_lora(config))
    return jax.jit(run).lower(weights, adapter, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))


def training_step(config: models.Config) -> jax.stages.Lowered:
    """A step of a LoRA's training, before it is compiled."""
    programs = make_programs(Config(data=(), out=Path()), config, steps=100)
    state = jax.eval_shape(lambda: programs.start(first_lora(config)))
    return jax.jit(programs.train).lower(abstract_base(config), state, batch(config))


def abstract_base(config: models.Config) -> dict[str, Any]:
    """The shapes of a base model's weights."""
    return table.abstract(models.table(config))


def first_lora(config: models.Config) -> dict[str, Any]:
    """A new LoRA on the family's usual projections."""
    shapes, targets = models.projections(config), models.default_targets(config)
    return init_lora(jax.random.key(0), shapes, targets=targets, rank=8, alpha=16)


def batch(config: models.Config) -> Batch:
    """The shapes of a batch: one accumulated part, with a source where the model reads one."""

    def of(size: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((1, ROWS, size), dtype)

    tokens, labels = of(LENGTH), of(LABELS)
    source = Source(tokens, tokens) if models.kind(config) == "encoder-decoder" else None
    return Batch(tokens, tokens, tokens, labels, labels, of(LABELS, jnp.float32), source)

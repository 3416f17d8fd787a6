"""How long a LoRA's training step takes to compile, two layers deep and thirty-two.

    python -m scripts.benchmark_compile

The layers are one scan, so a deep model is no larger a program than a shallow one. Only shapes are
compiled: no weights are made. Every family is timed, each depth twice, and the faster time counts.
"""

import time
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


def main() -> None:
    """Prints the table."""
    kinds = {file: kind for kind, file in reversed(models.FAMILIES.items())}  # each file's first
    programs = {kind: [model(kind, depth) for depth in DEPTHS] for kind in [*kinds.values()][::-1]}
    compile_seconds(next(iter(programs.values()))[0])  # the compiler itself has to start
    rows = []
    for kind, pair in programs.items():
        shallow, deep = (min(compile_seconds(config) for _ in range(2)) for config in pair)
        rows.append([kind, f"{shallow:.2f} s", f"{deep:.2f} s", f"{deep / shallow:.2f}x"])
    title = f"Compiling a LoRA's training step ({ROWS}x{LENGTH} tokens), tracing included"
    show(title, ["family", *(f"{depth} layers" for depth in DEPTHS), "ratio"], rows)


def model(kind: str, layers: int) -> models.Config:
    """A small model of a family (Hugging Face's model_type), as many layers deep."""
    depth = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), layers)
    return models.config_from_huggingface(SIZES | depth | {"model_type": kind})


def compile_seconds(config: models.Config) -> float:
    """The seconds from a model's shapes to the compiled step of a LoRA's training."""
    began = time.perf_counter()
    traced(config).compile()
    return time.perf_counter() - began


def traced(config: models.Config) -> jax.stages.Lowered:
    """The step before it is compiled."""
    programs = make_programs(Config(data=(), out=Path()), config, steps=100)
    state = jax.eval_shape(lambda: programs.start(first_lora(config)))
    weights = table.abstract(models.table(config))
    return jax.jit(programs.train).lower(weights, state, batch(config))


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


if __name__ == "__main__":
    main()

"""The model families behind one door: a config's family is the module that its type comes from."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import decoder
from lora_jax import table as tables
from lora_jax.decoder import Observe, Output
from lora_jax.errors import InputError
from lora_jax.families import llama
from lora_jax.modules import Adapter, Experts, LoRA, Saved
from lora_jax.parts import Cache, empty_cache
from lora_jax.project import Dropout
from lora_jax.table import Table

__all__ = ["Observe", "Output"]

# Hugging Face's model_type to the file that implements it.
FAMILIES = {"llama": llama, "mistral": llama, "qwen2": llama}


class Config(Protocol):
    """What every family's config says."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config of a Hugging Face `config.json`, whatever its family."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind].config_from_huggingface(raw, where)


def family(config: Config) -> ModuleType:
    """The file that implements a config's family."""
    return sys.modules[type(config).__module__]


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers would write for this model."""
    return family(config).config_to_huggingface(config)


def table(config: Config) -> Table:
    """The weight table of the model."""
    return family(config).table(config)


def projections(config: Config) -> dict[str, tuple[int, ...]]:
    """The projections that a module can change, by path, with their (layers, in, out) sizes."""
    return {path: leaf.shape for path, leaf in tables.kernels(table(config)).items()}


def default_targets(config: Config) -> tuple[str, ...]:
    """The projections that LoRA changes unless told: queries, keys, values and outputs."""
    return family(config).TARGETS


def ia3_layouts(config: Config) -> dict[str, dict[str, str]]:
    """Which projections IA3 rescales, and on which side, by layout: "peft" and "pem"."""
    return family(config).IA3_LAYOUTS


def forward(
    config: Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    tokens: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
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
    return decoder.forward(
        family(config),
        config,
        weights,
        adapter,
        tokens,
        segments=segments,
        positions=positions,
        cache=cache,
        dropout=dropout,
        observe=observe,
        remat=remat,
    )


def check_adapter(config: Config, adapter: Adapter) -> None:
    """Refuses an adapter with a module that this model has no place for."""
    known = {"embed", "unembed", *map(tables.module_path, table(config))}
    lost = [path for path in adapter if path not in known]
    if lost:
        has = ", ".join(projections(config))
        raise InputError(f"no projection {', '.join(lost)} for a module; this model has {has}")


@struct.dataclass
class Unembedding:
    """What turns hidden states into logits."""

    kernel: jax.Array  # (D, V)
    bias: jax.Array | None = None  # (V,)


def unembedding(config: Config, weights: Mapping[str, Any], adapter: Adapter) -> Unembedding:
    """The kernel and bias from hidden states to logits, with what an adapter makes of them."""
    weights, adapter = decoder.with_saved(weights, adapter)
    kernel = weights["unembed"] if "unembed" in weights else weights["embed"].T
    match adapter.get("unembed"):
        case LoRA(a, b, scale):
            kernel = kernel + (scale * a @ b).astype(kernel.dtype)
        case Experts():
            raise InputError("the unembedding cannot be routed; leave lm_head out of the library")
    return Unembedding(kernel, weights.get("unembed.bias"))


def trains_unembedding(adapter: Adapter) -> bool:
    """Whether a module changes the unembedding, or an embedding that it may share."""
    return isinstance(adapter.get("embed"), Saved) or not {"unembed", "unembed.bias"}.isdisjoint(
        adapter
    )


def unembed(
    config: Config, weights: Mapping[str, Any], adapter: Adapter, hidden: jax.Array
) -> jax.Array:
    """Logits (..., V) of hidden states (..., D), in the compute type."""
    head = unembedding(config, weights, adapter)
    logits = hidden @ head.kernel.astype(hidden.dtype)
    return logits if head.bias is None else logits + head.bias.astype(hidden.dtype)


def new_cache(config: Config, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty key-value cache for `batch` rows of up to `slots` positions."""
    return empty_cache(
        config.layers, batch, slots, config.kv_heads, config.head_width, jnp.dtype(dtype)
    )

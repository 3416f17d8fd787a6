"""The model families behind one door: a config's family is the module that its type comes from."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import llama
from lora_jax.errors import InputError
from lora_jax.parts import Cache, empty_cache
from lora_jax.table import Table

# Hugging Face's model_type to the file that implements it.
FAMILIES = {"llama": llama, "mistral": llama, "qwen2": llama}
Config = llama.Config
Output = llama.Output


def config_from_huggingface(raw: Mapping[str, Any], where: str = "config.json") -> Config:
    """The config of a Hugging Face `config.json`, whatever its family."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind].config_from_huggingface(raw, where)


def _family(config: Config) -> ModuleType:
    return sys.modules[type(config).__module__]


def config_to_huggingface(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers would write for this model."""
    return _family(config).config_to_huggingface(config)


def table(config: Config) -> Table:
    """The weight table of the model."""
    return _family(config).table(config)


def projections(config: Config) -> dict[str, tuple[int, int]]:
    """The projections that a module can change, by path, with their (in, out) sizes."""
    return _family(config).projections(config)


def forward(config: Config, weights, adapter, tokens: jax.Array, **options) -> Output:
    """The family's forward pass; see `llama.forward` for what it takes and gives."""
    return _family(config).forward(config, weights, adapter, tokens, **options)


def unembed(config: Config, weights, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) of hidden states (..., D)."""
    return _family(config).unembed(config, weights, hidden)


def unembedding(config: Config, weights) -> jax.Array:
    """The kernel (D, V) from hidden states to logits."""
    return _family(config).unembedding(config, weights)


def new_cache(config: Config, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty key-value cache for `batch` rows of up to `slots` positions."""
    return empty_cache(
        config.layers, batch, slots, config.kv_heads, config.head_width, jnp.dtype(dtype)
    )

"""The source side of an encoder-decoder: a text read once, as the decoder will attend to it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.decoder import Layer, Observe, embed, named, place, walk, with_saved, within
from lora_jax.modules import Adapter
from lora_jax.parts import Memory
from lora_jax.project import Dropout

Array = jax.Array


def encode(
    family: Any,
    config: Any,
    weights: Mapping[str, Any],
    adapter: Adapter,
    source: Array,
    segments: Array | None = None,
    *,
    dropout: Dropout | None = None,
    observe: Observe | None = None,
    remat: bool = False,
) -> Memory:
    """Every decoder layer's keys and values of a source (B, S); see `models.encode`."""
    weights, adapter = with_saved(weights, adapter)
    places, observed = place(source, segments, None, None), {}

    def through(stack: str, layer: Callable[[Array, Layer], Array], x: Array, drop: Dropout | None):
        """x after a stack's layers, and what they kept."""
        options = {"dropout": drop, "observe": observe, "remat": remat}
        x, out = walk(layer, x, weights[stack], within(adapter, weights, stack), **options)
        observed.update(named(out.get("observed", {}), stack))
        return x, out

    x = embed(weights["embed"], source, adapter.get("embed"))
    x, shared = family.begin_source(config, weights, x, places)
    apart = dropout and replace(dropout, key=jax.random.fold_in(dropout.key, 1))
    x, _ = through("encoder", partial(family.encoder_layer, config, shared), x, apart)
    x = family.finish_source(config, weights, x)

    def remember(nothing: Array, step: Layer) -> Array:
        """Keeps one decoder layer's keys and values of the source; no state goes on."""
        step.keep("memory", family.remember(config, x, step))
        return nothing

    keys, values = through("decoder", remember, jnp.zeros(()), dropout)[1]["memory"]
    return Memory(keys, values, places.segments, observed or None)

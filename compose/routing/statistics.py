"""How a batch is routed: which modules take part, and how evenly."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.models import Observe
from lora_jax.modules import Adapter, Experts, Module
from lora_jax.routing import mixture

Array = jax.Array


def observe_routing(mask: Array) -> Observe:
    """An `observe` for `models.forward` that gives each projection's routing, over real tokens.

    `mask` (B, T) is true at real tokens. Gives {"share": (M,), the mean weight of each module,
    "entropy": (), the mean entropy of a token's weights in nats}; nothing where nothing is routed.
    """

    def observe(path: str, module: Module | None, x: Array) -> dict[str, Array]:
        """The routing of one projection, at one layer."""
        if not isinstance(module, Experts):
            return {}
        weights = mixture(x, module)
        entropy = -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)
        return {
            "share": jnp.mean(weights, axis=(0, 1), where=mask[..., None]),
            "entropy": jnp.mean(entropy, where=mask),
        }

    return observe


def routing_statistics(
    config: models.Config,
    weights: Mapping[str, Any],
    adapter: Adapter,
    tokens: Array,
    segments: Array | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """How a batch (B, T) is routed, by projection and layer; padding (segment 0) does not count.

    Each routed projection has "share" (N, M), the mean weight of each module; "entropy" (N,), of a
    token's weights, in nats; and "relative_entropy", in units of its bound log(top_k).
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    observed = jax.device_get(_observed(config, weights, adapter, tokens, segments))
    experts = {path: module for path, module in adapter.items() if isinstance(module, Experts)}
    return {path: _with_bound(observed[path], module.top_k) for path, module in experts.items()}


def _with_bound(found: dict[str, np.ndarray], top_k: int) -> dict[str, np.ndarray]:
    """A projection's statistics, with the entropy over its largest possible value."""
    bound = np.log(top_k) or 1.0  # a token with one module has no entropy to relate
    return {**found, "relative_entropy": found["entropy"] / bound}


@partial(jax.jit, static_argnames="config")
def _observed(config, weights, adapter, tokens, segments):
    """What `observe_routing` gives for every projection, compiled."""
    look = observe_routing(segments > 0)
    return models.forward(
        config, weights, adapter, tokens, segments=segments, observe=look
    ).observed

"""Arrow: routing over a library with no training, by what each module amplifies most.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs".
`lora_jax.routing` applies what is built here.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compose.align import fold_scale
from compose.library import Library, Routing, stack
from compose.lowrank import svd
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.models import Observe
from lora_jax.modules import Adapter, Experts, LoRA, Module
from lora_jax.routing import route

Array = jax.Array
MIXINGS = ("outputs", "factors")


def prototypes(a: Array, b: Array) -> Array:
    """The unit input directions (..., I) that the deltas a·b amplify most; zero for a zero delta.

    The top left singular vector, exact, by QR of the factors; its largest entry is positive.
    """
    u, s, _ = svd(LoRA(a, b))
    return jnp.where(s[..., :1] > 0, u[..., 0], 0)


def refuse_routing(routing: Routing, count: int) -> None:
    """Refuses settings by which `count` modules cannot be routed."""
    if not 1 <= routing.top_k <= count:
        raise InputError(
            f"top_k must lie between 1 and the library's {count} modules; got {routing.top_k}"
        )
    if not routing.temperature > 0:
        raise InputError(f"temperature must be above 0; got {routing.temperature}")
    if routing.mixing not in MIXINGS:
        raise InputError(f"unknown mixing {routing.mixing!r}; choose {' or '.join(MIXINGS)}")


def routing_for(library: Library, top_k: int | None, temperature: float, mixing: str) -> Routing:
    """Arrow's settings for a library of LoRA modules, checked; `top_k` is at most 3 unless given.

    One module or two are all taken then.
    """
    _refuse_other_kinds(library)
    count = len(library.names)
    routing = Routing(min(3, count) if top_k is None else top_k, temperature, mixing)
    refuse_routing(routing, count)
    return routing


def _refuse_other_kinds(library: Library) -> None:
    """Refuses a library that holds anything but LoRA modules, naming what it holds and where."""
    held = [(path, _kind(m)) for adapter in library.adapters for path, m in adapter.items()]
    if other := [path for path, kind in held if kind != "LoRA"]:
        kinds = " and ".join(sorted({kind for _, kind in held}))
        raise InputError(f"{other[0]}: Arrow routes LoRA modules; this library holds {kinds}")


def _kind(module: Module) -> str:
    biased = isinstance(module, LoRA) and module.bias is not None
    return type(module).__name__ + " with a lora_bias" * biased


def route_library(
    library: Library, *, top_k: int | None = None, temperature: float = 1.0, mixing: str = "outputs"
) -> dict[str, Experts]:
    """One adapter that routes each token, at each projection, over the library's modules.

    Leaves are (N, M, ...). `mixing` is "outputs" (PEFT) or "factors" (MTTL, GenKnowSub's code);
    `top_k` is 3 unless given, or all of fewer modules.
    """
    settings = dataclasses.asdict(routing_for(library, top_k, temperature, mixing))

    def experts(module: Any) -> Experts:
        a, b = (jnp.moveaxis(x, 0, -3) for x in (module.a, fold_scale(module).b))
        return Experts(a, b, prototypes(a, b), **settings)

    return {path: experts(module) for path, module in stack(library.adapters).items()}


def applied(value: Adapter | Library) -> Adapter:
    """The adapter that a forward pass takes: itself, or a library routed as its settings say."""
    if not isinstance(value, Library):
        return value
    if value.routing is None:
        raise InputError(
            f"a library of {len(value.names)} modules is not one module; write arrow() or mean()"
        )
    return route_library(value, **dataclasses.asdict(value.routing))


def observe_routing(mask: Array) -> Observe:
    """An `observe` for `models.forward` that gives each projection's routing, over real tokens.

    `mask` (B, T) is true at real tokens. Gives {"share": (M,), the mean weight of each module,
    "entropy": (), the mean entropy of a token's weights in nats}; nothing where nothing is routed.
    """

    def observe(path: str, module: Module | None, x: Array) -> dict[str, Array]:
        """The routing of one projection, at one layer."""
        if not isinstance(module, Experts):
            return {}
        weights = route(x, module.prototypes, module.top_k, module.temperature)
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

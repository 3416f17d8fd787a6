"""Arrow: routing over a library with no training, by what each module amplifies most.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (2405.11157).
`compose.routing` builds it and the other routers, `lora_jax.routing` applies what they build.
"""

from compose.library import Library, Routing
from compose.routing.build import applied, route
from compose.routing.directions import prototypes
from compose.routing.settings import refuse_routing, routing_for
from compose.routing.statistics import observe_routing, routing_statistics
from lora_jax.modules import Experts

__all__ = [
    "applied",
    "observe_routing",
    "prototypes",
    "refuse_routing",
    "route_library",
    "routing_statistics",
]


def route_library(
    library: Library,
    *,
    top_k: int | None = None,
    temperature: float | str = 1.0,
    mixing: str = "outputs",
    inputs: str = "raw",
    prototypes: str = "own",
    weighting: str = "softmax",
) -> dict[str, Experts]:
    """One adapter that routes each token, at each projection, over the library's modules.

    Leaves are (N, M, ...). `mixing` is "outputs" (PEFT) or "factors" (MTTL, GenKnowSub's code);
    `top_k` is 3 unless given, or all of fewer modules; `temperature` a number or "sqrt(d)".
    `inputs` are "raw", or "unit", "centred" or "standard" (both) before they meet the prototypes,
    which are each projection's "own" or "shared" by queries, keys and values. `weighting` is a
    "softmax" or "uniform".
    """
    usual = Routing(
        temperature=temperature,
        mixing=mixing,
        inputs=inputs,
        prototypes=prototypes,
        weighting=weighting,
    )
    return route(library, routing_for(library, usual, top_k))

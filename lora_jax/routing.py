"""Routing tokens between the modules of a library, at one projection.

Arrow: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
section 3.2. `compose.arrow` builds the prototypes; this file applies them.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from lora_jax.modules import Experts


def route(x: jax.Array, prototypes: jax.Array, top_k: int, temperature: float = 1.0) -> jax.Array:
    """Each token's mixing weights (..., M): a softmax over its `top_k` best-aligned modules.

    `x` is (..., I) and not normalised; `prototypes` is (M, I). Alignment is |x·p|, unsigned because
    a singular vector's sign is arbitrary. Modules that tie for the last place all take part.
    """
    return _mixed(jnp.einsum("...I,MI->...M", x, prototypes.astype(x.dtype)), top_k, temperature)


def _mixed(alignment: jax.Array, top_k: int, temperature: float) -> jax.Array:
    """Mixing weights (..., M) in float32 from each token's x·p."""
    logits = jnp.abs(alignment).astype(jnp.float32)
    return jax.nn.softmax(logits / temperature, where=logits >= _kth_largest(logits, top_k))


def _kth_largest(logits: jax.Array, k: int) -> jax.Array:
    """The k-th largest of the last axis, kept; k passes of a maximum beat a sort for k so small."""
    if k > 8:
        return jax.lax.top_k(logits, k)[0][..., -1:]
    floor = jnp.max(logits, axis=-1, keepdims=True)
    for _ in range(k - 1):
        below = jnp.max(logits, axis=-1, keepdims=True, where=logits < floor, initial=-jnp.inf)
        ties = jnp.sum(logits >= floor, axis=-1, keepdims=True)
        floor = jnp.where(ties < k, below, floor)
    return floor


def routed(x: jax.Array, experts: Experts) -> jax.Array:
    """What the experts add to a projection's output (..., O), mixed for each token of x (..., I).

    "outputs" mixing is Σ wₑ x aₑ bₑ in two thin products: x times all a's, scaled by the weights,
    times all b's stacked. The array (tokens, M, O) never exists. "factors" is
    (Σ wₑ aₑ)(Σ wₑ bₑ): the same two products with the ranks summed between them.
    """
    count, rank = experts.a.shape[-3], experts.a.shape[-1]
    a = rearrange(experts.a, "M I R -> I (M R)")
    b = rearrange(experts.b, "M R O -> (M R) O").astype(x.dtype)
    # Prototypes and a's meet x in one product: thin ones cost by their number, not their width.
    both = x @ jnp.concatenate([experts.prototypes.T, a], axis=1).astype(x.dtype)
    weights = _mixed(both[..., :count], experts.top_k, experts.temperature).astype(x.dtype)
    inner = both[..., count:]
    if experts.mixing == "factors":
        inner = rearrange(inner, "... (M R) -> ... M R", M=count) * weights[..., None]
        inner = jnp.tile(inner.sum(-2), count)
    return (inner * jnp.repeat(weights, rank, axis=-1)) @ b

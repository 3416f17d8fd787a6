"""The experts that were chosen, and no others: for libraries too large to compute every expert."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from lora_jax.modules import Experts

# What copying one expert's factors together for a token costs, in products of a token with one
# expert among all; and the tokens whose products cost what reading one expert does. Measured on two
# AVX-512 cores (docs/benchmarks.md); not measured on accelerators, where products are cheaper.
GATHER, FIXED = 40, 16

# Bytes of factors copied together at a time: what a core's cache holds, or a share of a device's.
_BLOCK = {"cpu": 4 << 20, "default": 256 << 20}


def worthwhile(shape: tuple[int, ...], experts: Experts) -> bool:
    """Whether computing only the chosen experts is expected to beat computing all, by sizes alone.

    For tokens of a `shape` (..., I). With M experts, the best K of them and T tokens:
    M (T + FIXED) > K (GATHER G + T), where the choice is made G times: for each token, each example
    or the whole batch.
    """
    count, top_k = experts.a.shape[0], experts.top_k
    if top_k >= count or experts.weighting == "sigmoid":
        return False
    tokens = math.prod(shape[:-1])
    groups = tokens if experts.shares is None else math.prod(experts.shares.shape[:-1])
    return count * (tokens + FIXED) > top_k * (GATHER * groups + tokens)


def mixed(
    x: jax.Array, experts: Experts, index: jax.Array, weights: jax.Array, inner: jax.Array | None
) -> jax.Array:
    """What the experts at `index` add (..., O) for x (..., I), mixed by `weights`, both (..., K).

    Leading axes that index lacks have one choice for all. `inner` is x·a (..., M, R) if it is known
    anyway. An expert that is not chosen gets no gradient, nor does its share.
    """
    groups, top_k = math.prod(index.shape[:-1]), index.shape[-1]
    each = x.reshape(groups, -1, x.shape[-1])
    index, weights = (leaf.reshape(groups, top_k) for leaf in (index, weights.astype(x.dtype)))
    if inner is not None:
        inner = inner.reshape(groups, -1, *inner.shape[-2:])
        inner = jnp.take_along_axis(inner, index[:, None, :, None], axis=2)
    branches = {
        platform: partial(_in_blocks, experts, max(1, room // _bytes(x, experts)))
        for platform, room in _BLOCK.items()
    }
    out = jax.lax.platform_dependent(each, index, weights, inner, **branches)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _bytes(x: jax.Array, experts: Experts) -> int:
    """The bytes of the factors that one choice copies."""
    _, size, rank = experts.a.shape
    size = (0 if experts.spectrum is not None else size) + experts.b.shape[-1]
    return experts.top_k * rank * size * x.dtype.itemsize


def _in_blocks(
    experts: Experts,
    block: int,
    x: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    inner: jax.Array | None,
) -> jax.Array:
    """The mixtures (G, S, O) of groups of tokens x (G, S, I), `block` of them at a time."""
    one = partial(_one, experts)
    if block >= len(x):
        return jax.vmap(lambda group: one(*group))((x, index, weights, inner))
    return jax.lax.map(lambda group: one(*group), (x, index, weights, inner), batch_size=block)


def _one(
    experts: Experts, x: jax.Array, index: jax.Array, weights: jax.Array, inner: jax.Array | None
) -> jax.Array:
    """One group's mixture (S, O), of x (S, I) under one choice (K,) of experts."""
    if inner is None:
        inner = jnp.einsum("SI,KIR->SKR", x, experts.a[index].astype(x.dtype))
    if experts.mixing == "factors":
        inner = jnp.einsum("SKR,K->SR", inner, weights)[:, None]
    b = experts.b[index].astype(x.dtype)
    return jnp.einsum("SKR,KRO->SO", inner * weights[:, None], b)

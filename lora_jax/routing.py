"""Routing tokens between the modules of a library, at one projection.

What an expert scores for a token x (`compose.routing` builds each, docs/routing.md has the papers):

    prototypes  |x·p| (score "absolute": Arrow) or x·p ("signed": gates, mean activations), over
                ‖x‖ (inputs "unit") or over the deviation of x's features ("standard")
    spectrum    ‖(x·a) ∘ s‖, over the expert's ranks (SpectR)

The best `top_k` are weighted by a softmax of score / temperature, or evenly ("uniform"); a
"sigmoid" weighs every expert by itself. `shares` are weights given beforehand.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from einops import rearrange

from lora_jax import selected
from lora_jax.modules import Experts

_FEW = 16  # experts that are sorted by themselves
_TILE = 64  # columns of a product that a processor takes at once; a part of them costs as much
_EPS = 1e-6  # below any length or deviation of a token that says something


def route(x: jax.Array, prototypes: jax.Array, top_k: int, temperature: float = 1.0) -> jax.Array:
    """Each token's mixing weights (..., M): a softmax over its `top_k` best-aligned modules.

    `x` is (..., I) and not normalised; `prototypes` is (M, I). Alignment is |x·p|, unsigned because
    a singular vector's sign is arbitrary. Modules that tie for the last place all take part.
    """
    alignment = jnp.einsum(
        "...I,MI->...M", x, prototypes.astype(x.dtype), preferred_element_type=jnp.float32
    )
    return _over_best(jnp.abs(alignment), top_k, temperature)


def mixture(x: jax.Array, experts: Experts) -> jax.Array:
    """Each token's mixing weights (..., M) in float32, over all experts, for x (..., I).

    Modules that tie for the last place all take part.
    """
    return _weights(x, experts, *_products(x, [experts], every=[False])[0])


def routed(x: jax.Array, experts: Experts) -> jax.Array:
    """What the experts add to a projection's output (..., O), mixed for each token of x (..., I).

    "outputs" mixing is Σ wₑ x aₑ bₑ, "factors" (Σ wₑ aₑ)(Σ wₑ bₑ). In a large library only the
    experts that were chosen are computed, where `selected.worthwhile` says so.
    """
    return routed_all(x, [experts])[0]


def routed_all(x: jax.Array, libraries: Sequence[Experts]) -> list[jax.Array]:
    """`routed` for several projections of one x, which meets what they all need in one product."""
    every = [not selected.worthwhile(x.shape, experts) for experts in libraries]
    ways = [_all if all_of_them else _chosen_alone for all_of_them in every]
    products = _products(x, libraries, every)
    return [way(x, e, *p) for way, e, p in zip(ways, libraries, products, strict=True)]


def all_experts(x: jax.Array, experts: Experts) -> jax.Array:
    """`routed` in two thin products: x times all a's, scaled by the weights, times all b's stacked.

    The array (tokens, M, O) never exists. To mix factors, the ranks are summed between the two.
    """
    return _all(x, experts, *_products(x, [experts], every=[True])[0])


def chosen_experts(x: jax.Array, experts: Experts) -> jax.Array:
    """`routed` with the factors of each token's `top_k` experts alone.

    Of modules that tie for the last place, those that come first take part, not all.
    """
    return _chosen_alone(x, experts, *_products(x, [experts], every=[False])[0])


def _all(
    x: jax.Array, experts: Experts, dots: jax.Array | None, inner: jax.Array | None
) -> jax.Array:
    """`all_experts`, from what `_products` gave."""
    assert inner is not None
    weights = _weights(x, experts, dots, inner).astype(x.dtype)
    if experts.mixing == "factors":
        mixed = jnp.sum(inner * weights[..., None], axis=-2, keepdims=True)
        inner = jnp.broadcast_to(mixed, inner.shape)
    b = rearrange(experts.b, "M R O -> (M R) O").astype(x.dtype)
    flat = rearrange(inner, "... M R -> ... (M R)")
    return (flat * jnp.repeat(weights, inner.shape[-1], axis=-1)) @ b


def _chosen_alone(
    x: jax.Array, experts: Experts, dots: jax.Array | None, inner: jax.Array | None
) -> jax.Array:
    """`chosen_experts`, from what `_products` gave."""
    return selected.mixed(x, experts, *_chosen(x, experts, dots, inner), inner)


def _products(
    x: jax.Array, libraries: Sequence[Experts], every: Sequence[bool]
) -> list[tuple[jax.Array | None, jax.Array | None]]:
    """For each library x·prototypes (..., M) in float32, if it has any, and x·a (..., M, R).

    The latter is None where neither the scores need it nor `every` expert is asked for.
    """
    columns = [_columns(e, inside) for e, inside in zip(libraries, every, strict=True)]
    blocks = iter(_blocks(x, [block for two in columns for block in two if block is not None]))
    products = []
    for experts, (a, prototypes) in zip(libraries, columns, strict=True):
        rank = experts.a.shape[-1]
        inner = None if a is None else next(blocks)
        dots = None if prototypes is None else next(blocks)
        if experts.leading and inner is not None:
            dots = inner[..., ::rank]
        if inner is not None:
            inner = rearrange(inner, "... (M R) -> ... M R", R=rank).astype(x.dtype)
        products.append((dots, inner))
    return products


def _columns(experts: Experts, inside: bool) -> tuple[jax.Array | None, jax.Array | None]:
    """A library's a's (I, M·R), if they are asked for, and its prototypes (I, M), if apart."""
    inside = inside or experts.spectrum is not None
    a = rearrange(experts.a, "M I R -> I (M R)") if inside else None
    if experts.prototypes is None or (inside and experts.leading):
        return a, None
    return a, experts.prototypes.T


def _blocks(x: jax.Array, columns: list[jax.Array]) -> list[jax.Array]:
    """x (..., I) times each block of columns (I, N): (..., N).

    It is one product, for thin ones cost by their number more than by their width. Its sums stay
    in float32, or bfloat16 would make ties where there are none.
    """
    if not columns:
        return []
    thin = jnp.concatenate(columns, axis=1)
    if (width := thin.shape[1]) > _TILE:
        thin = jnp.pad(thin, ((0, 0), (0, -width % _TILE)))
    both = jnp.matmul(x, thin.astype(x.dtype), preferred_element_type=jnp.float32)
    ends = list(accumulate(block.shape[1] for block in columns))
    return [both[..., end - block.shape[1] : end] for block, end in zip(columns, ends, strict=True)]


def _scores(
    x: jax.Array, experts: Experts, dots: jax.Array | None, inner: jax.Array | None
) -> jax.Array:
    """Each expert's score (..., M) for each token of x (..., I), in float32."""
    if experts.spectrum is not None:
        assert inner is not None
        return _length(inner.astype(jnp.float32) * experts.spectrum)
    assert dots is not None
    wide = x.astype(jnp.float32)
    if experts.inputs == "unit":
        dots = dots / jnp.maximum(_length(wide), _EPS)[..., None]
    elif experts.inputs == "standard":  # the prototypes are centred, and so x need not be
        dots = dots * jax.lax.rsqrt(jnp.var(wide, axis=-1, keepdims=True) + _EPS)
    return jnp.abs(dots) if experts.score == "absolute" else dots


def _length(x: jax.Array) -> jax.Array:
    """The norm of the last axis, with a gradient of zero at zero."""
    square = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _weights(
    x: jax.Array, experts: Experts, dots: jax.Array | None, inner: jax.Array | None
) -> jax.Array:
    """Mixing weights (..., M) over all experts, from what `_products` gave."""
    if experts.shares is not None:
        shares = experts.shares.astype(jnp.float32)
        if shares.ndim == 2:
            shares = jnp.expand_dims(shares, range(1, x.ndim - 1))
        return jnp.broadcast_to(shares, (*x.shape[:-1], shares.shape[-1]))
    scores = _scores(x, experts, dots, inner)
    if experts.weighting == "sigmoid":
        return jax.nn.sigmoid(scores / experts.temperature)
    even = experts.weighting == "uniform"
    return _over_best(scores, experts.top_k, experts.temperature, even=even)


def _over_best(
    scores: jax.Array, top_k: int, temperature: float, *, even: bool = False
) -> jax.Array:
    """A softmax (..., M) over the `top_k` largest scores, or the same weight for each of them."""
    first, last = jax.lax.stop_gradient(_first_and_kth(scores, top_k))
    heights = jnp.ones_like(scores) if even else jnp.exp((scores - first) / temperature)
    kept = jnp.where(scores >= last, heights, 0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


def _first_and_kth(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The largest and the k-th largest of the last axis, kept, of which a few are equal at times.

    Few experts are sorted into k places one by one, all in one loop over the tokens; of many it is
    k passes of a maximum, which beat a sort for k so small.
    """
    if k > 8:
        best = jax.lax.top_k(scores, k)[0]
        return best[..., :1], best[..., -1:]
    if scores.shape[-1] <= _FEW:
        places = [jnp.full_like(scores[..., :1], -jnp.inf)] * k
        for expert in range(scores.shape[-1]):
            rest = scores[..., expert : expert + 1]
            for n, held in enumerate(places):
                places[n], rest = jnp.maximum(held, rest), jnp.minimum(held, rest)
        return places[0], places[-1]
    first = floor = jnp.max(scores, axis=-1, keepdims=True)
    for _ in range(k - 1):
        below = jnp.max(scores, axis=-1, keepdims=True, where=scores < floor, initial=-jnp.inf)
        ties = jnp.sum(scores >= floor, axis=-1, keepdims=True)
        floor = jnp.where(ties < k, below, floor)
    return first, floor


def _chosen(
    x: jax.Array, experts: Experts, dots: jax.Array | None, inner: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The numbers and weights (..., K) of just `top_k` experts; ties go to the first of them."""
    if experts.shares is not None:
        weights, index = _largest(experts.shares.astype(jnp.float32), experts.top_k)
        return index, weights
    best, index = _largest(_scores(x, experts, dots, inner), experts.top_k)
    if experts.weighting == "uniform":
        return index, jnp.full_like(best, 1 / experts.top_k)
    return index, jax.nn.softmax(best / experts.temperature)


def _largest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis and where they are, found once.

    XLA would merge their slices with those of blocks of tokens, and then sort all of the scores: a
    CPU takes ten times as long over 1,000 experts.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(scores, k))

"""DELLA: entries dropped by lot, small ones more often than large ones.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
Sampling" (2406.11617), section 3. Entries are ranked by magnitude among those of one output (a
row of the paper's matrices, a column here).
"""

import jax
import jax.numpy as jnp

from compose.merging import sparse
from compose.merging.magnitude import value_of
from compose.merging.members import Members, joined, weighted
from compose.merging.signs import mean_by_count, sum_by_weight
from compose.merging.sparse import Density, Number, Sparse
from compose.option_values import refuse_faults
from lora_jax.errors import InputError

Array = jax.Array


def della(
    members: Members,
    weights: Array,
    *,
    key: Array,
    density: Density = 1.0,
    epsilon: Number = 0.1,
    majority: str = "total",
) -> Array:
    """DELLA as its paper (2406.11617) has it: each entry over its own chance, signs as in `ties`.

    Chances fall from density + ε/2 for a row's largest by ε/n for each of its n entries.
    """
    drop = _by_rank(density, epsilon / 2, paper=True)

    def formula(xs: Array, key: Array) -> Array:
        """The mean of a block's agreeing entries."""
        return mean_by_count(drop(xs, key), weights, majority)

    return joined(formula, members, key=key, columns=True)


def della_mergekit(
    members: Members,
    weights: Array,
    *,
    key: Array,
    density: Density = 1.0,
    epsilon: Number = 0.15,
    majority: str = "total",
) -> Array:
    """DELLA (2406.11617) as mergekit has it: chances from density - ε to density + ε, both taken.

    What is kept is rescaled to the module's sum of magnitudes, and signs are elected and the sum is
    divided as in `ties_mergekit`.
    """
    drop = _rescaled(members, density, epsilon, key)

    def formula(xs: Array, key: Array) -> Array:
        """The weighted mean of a block's agreeing entries."""
        return sum_by_weight(drop(xs, key), weights, majority, normalize=True)

    return joined(formula, members, key=key, columns=True)


def della_linear_mergekit(
    members: Members,
    weights: Array,
    *,
    key: Array,
    density: Density = 1.0,
    epsilon: Number = 0.15,
) -> Array:
    """The weighted sum of the same entries (DELLA, 2406.11617; mergekit), with no election."""
    drop = _rescaled(members, density, epsilon, key)

    def formula(xs: Array, key: Array) -> Array:
        """The weighted sum of a block's kept entries."""
        return weighted(drop(xs, key), weights)

    return joined(formula, members, key=key, columns=True)


def _rescaled(members: Members, density: Density, epsilon: Number, key: Array) -> Sparse:
    """mergekit's drop: by rank, then to the sum of magnitudes that was."""
    return sparse.rescaled(members, _by_rank(density, epsilon, paper=False), key, columns=True)


def _by_rank(density: Density, reach: Number, *, paper: bool) -> Sparse:
    """Entries (M, I, ...) kept by chances within `reach` of the density; over them in the paper."""
    refuse_faults(density=density)
    if isinstance(density, float | int) and density >= 1:
        return lambda xs, key: xs
    if told := beyond(density, reach):
        raise InputError(told)
    middle = value_of(density)

    def drop(xs: Array, key: Array) -> Array:
        """A block with entries at zero."""
        count = xs.shape[1]
        ranks = jnp.argsort(jnp.argsort(jnp.abs(xs), axis=1), axis=1)  # 0 is the smallest's
        steps = (ranks + 1) / count if paper else ranks / max(count - 1, 1)
        chances = middle - reach + 2 * reach * steps
        keep = jax.random.bernoulli(key, chances)
        return jnp.where(keep, xs / chances if paper else xs, 0)

    return drop


def beyond(density: Density, reach: Number) -> str:
    """What is known to be wrong with chances `reach` on both sides of a density, or ""."""
    if not (isinstance(density, float | int) and isinstance(reach, float | int)):
        return ""
    low, high = density - reach, density + reach
    if density >= 1 or 0 < low <= high <= 1:
        return ""
    return (
        f"chances from {low:g} to {high:g} must lie between 0 and 1; choose another density or a "
        f"smaller epsilon"
    )

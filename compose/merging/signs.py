"""Which sign modules agree on, entry by entry, and the sums of those that bear it (TIES).

PEFT and mergekit read the paper differently: PEFT elects on tensors as they are and divides by how
many agree, mergekit elects on weighted ones and divides by the weights of those that agree.
"""

import jax
import jax.numpy as jnp

from compose.decompositions import wide
from compose.merging.members import per_member, total, weighted
from compose.option_values import refuse_faults

Array = jax.Array


def agreeing(xs: Array, majority: str) -> Array:
    """Which entries of (M, *S) bear the sign elected at their place; a tie elects plus.

    "total" elects by the sum of the entries, "frequency" by the number of each sign.
    """
    refuse_faults(majority=majority)
    signs = jnp.sign(xs)
    votes = total(xs if majority == "total" else signs)
    return signs == jnp.where(votes >= 0, 1, -1)


def mean_by_count(xs: Array, weights: Array, majority: str) -> Array:
    """Σ wᵢxᵢ over those that agree, divided by how many they are; PEFT's election."""
    agree = agreeing(xs, majority)
    return weighted(jnp.where(agree, xs, 0), weights) / jnp.maximum(total(agree), 1)


def sum_by_weight(xs: Array, weights: Array, majority: str, *, normalize: bool) -> Array:
    """Σ wᵢxᵢ over those that agree, divided by their Σ wᵢ if so asked; mergekit's election."""
    agree = agreeing(per_member(weights, xs) * xs, majority)
    found = weighted(jnp.where(agree, xs, 0), weights)
    if not normalize:
        return found
    share = weighted(wide(agree), weights)
    return found / jnp.where(share == 0, 1, share)

"""Merging by singular vectors: whitened ones (TSV-M) and ones of equal strength (Iso-C, Iso-CTS).

Each is a function of one projection at one layer: `members` is a LoRA with the axis M in front, and
the result is a LoRA without it. The papers take dense matrices, whose singular values are mostly
not zero; of a LoRA's delta all but R are, and the directions that belong to them are arbitrary.
Here only those that are there take part, as in the released code of Core Space.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from compose import lowrank
from compose.decompositions import significant
from compose.merging.cores import (
    bases,
    coordinates,
    directions,
    orthonormal,
    product,
)
from compose.option_values import refuse_faults
from lora_jax.modules import LoRA

Array = jax.Array


def tsv(members: LoRA, weights: Array, *, keep: int | None = None) -> LoRA:
    """TSV-M: each module's strongest singular triplets, their vectors made orthogonal over modules.

    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging"
    (2412.00081), TSV-M: Δ = polar([U₁ … U_M]) · diag(w₁S₁ … w_M S_M) · polar([V₁ … V_M])ᵀ.
    Of each module the first `keep` triplets count; unless given min(I, O) / M, so that they fit
    side by side, or all R where that is fewer. Linear in the weights.
    """
    count, width, rank = members.a.shape
    most = min(width, members.b.shape[-1]) // count
    refuse_faults(keep=keep)
    keep = min(rank, max(most, 1) if keep is None else keep)
    u, s, v = _triplets(members, keep)
    s = rearrange(weights[:, None] * s, "M K -> (M K)")
    return product(orthonormal(u) * s, orthonormal(v).T, members)


def _triplets(members: LoRA, keep: int, first: Array | None = None) -> tuple[Array, Array, Array]:
    """The first of each module's singular triplets: U (I, M·keep), S (M, keep), V (O, M·keep).

    Vectors without strength are zero, and those beyond the `first` few, if it is given.
    """
    u, s, vt = lowrank.svd(members)
    there = significant(s, members.a.shape[-1])[:, None]
    if first is not None:
        there &= jnp.arange(there.shape[-1]) < first
    u, s, v = (x[..., :keep] for x in (u * there, s * there[:, 0], vt.mT * there))
    return rearrange(u, "M I K -> I (M K)"), s, rearrange(v, "M O K -> O (M K)")


def iso_c(members: LoRA, weights: Array) -> LoRA:
    """Iso-C: the sum of the deltas with its singular values replaced by their mean.

    Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces" (2502.04959). One module alone has nothing to share and stays itself.
    """
    left, cores, right = bases(members)
    total = jnp.einsum("M,MKL->KL", weights, cores)
    if len(cores) == 1:
        return product(left, total @ right, members)
    even = orthonormal(total)
    rank = jax.lax.stop_gradient(jnp.round(jnp.sum(even**2)))
    strength = jnp.sum(even * total) / jnp.maximum(rank, 1)  # the sum of the singular values
    return product(left @ even * strength, right, members)


def iso_cts(members: LoRA, weights: Array, *, common: float = 0.8) -> LoRA:
    """Iso-CTS: a share `common` of the directions from the sum, the rest from each module's own.

    Marczak et al. (2502.04959): what the sum's first output directions leave of each
    module gives its first singular triplets; all of them side by side are made orthogonal, and
    every direction gets the mean strength. There are as many directions as the sum has ranks.
    """
    refuse_faults(common=common)
    left, a, b, right = coordinates(members)
    b = weights[:, None, None] * b
    total, count = jnp.einsum("MKR,MRL->KL", a, b), len(a)
    if count == 1:
        return product(left, total @ right, members)
    u, s, vt = directions(total)
    # How many directions each module has of its own, by the rank of the sum: padding counts none.
    each = [round((size - int(size * common)) / count) for size in range(len(s) + 1)]
    rank = jnp.sum(s > 0)
    own = jnp.array(each)[rank]
    u, s, v = (x * (jnp.arange(len(s)) < rank - own * count) for x in (u, s, vt.T))
    own_u, own_s, own_v = _triplets(LoRA(a, b - b @ v @ v.T), each[-1], own)
    s = jnp.concatenate([s, own_s.ravel()])
    strength = jnp.sum(s) / jnp.maximum(jnp.sum(s > 0), 1)
    u = orthonormal(jnp.hstack([u, own_u]))
    # One after the other: mapped over weights on a CPU, both at once could wait for ever.
    u, v = jax.lax.optimization_barrier((u, jnp.hstack([v, own_v])))
    return product(left @ u * strength, orthonormal(v).T @ right, members)

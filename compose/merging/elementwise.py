"""The merging methods that work entry by entry, by name, under PEFT's and mergekit's definitions.

Each takes the modules of one projection at one layer (`compose.merging.members`), weights (M,) and
its own options, and gives the merged tensor (*S). A `key` draws what is left to chance. At their
defaults nothing is dropped. Names that end in _mergekit follow mergekit 0.1.4, others PEFT 0.21.2
where it has them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compose.decompositions import ratio
from compose.merging import sparse
from compose.merging.della import della, della_linear_mergekit, della_mergekit
from compose.merging.members import Members, joined, weighted
from compose.merging.signs import mean_by_count, sum_by_weight
from compose.merging.slerp import slerp
from compose.merging.sparse import Density
from compose.merging.unlearning import negmerge
from compose.merging.wudi import wudi_adam

Array = jax.Array


def linear(members: Members, weights: Array) -> Array:
    """The weighted sum: task arithmetic.

    Ilharco et al., "Editing Models with Task Arithmetic" (2212.04089), section 2.
    """
    return joined(lambda xs: weighted(xs, weights), members)


def magnitude_prune(members: Members, weights: Array, *, density: Density = 1.0) -> Array:
    """The weighted sum of each module's largest entries, a `density` of them (PEFT).

    The trim of TIES (2306.01708, section 4) without its election.
    """
    trim = sparse.trimmed(members, density)
    return joined(lambda xs: weighted(trim(xs), weights), members)


def ties(
    members: Members, weights: Array, *, density: Density = 1.0, majority: str = "total"
) -> Array:
    """TIES as PEFT has it: trim, elect a sign on the trimmed modules, average those that agree.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2306.01708), section
    4: there the weights are one λ. A weight multiplies what agrees and has no vote; the divisor is
    how many agree. `majority` is "total" (the paper's) or "frequency".
    """
    trim = sparse.trimmed(members, density)
    return joined(lambda xs: mean_by_count(trim(xs), weights, majority), members)


def ties_mergekit(
    members: Members, weights: Array, *, density: Density = 1.0, majority: str = "total"
) -> Array:
    """TIES (2306.01708) as mergekit has it: weighted modules vote, and agreeing weights divide."""
    trim = sparse.trimmed(members, density)
    return joined(lambda xs: sum_by_weight(trim(xs), weights, majority, normalize=True), members)


def dare_linear(members: Members, weights: Array, *, key: Array, density: Density = 1.0) -> Array:
    """DARE: entries are kept by lot and divided by the chance, `density`, of it; weighted sum.

    Yu et al., "Language Models are Super Mario" (2311.03099), equation 2; density is 1 - p.
    """
    drop = sparse.dropped(density)
    return joined(lambda xs, key: weighted(drop(xs, key), weights), members, key=key)


def dare_ties(
    members: Members,
    weights: Array,
    *,
    key: Array,
    density: Density = 1.0,
    majority: str = "total",
) -> Array:
    """DARE's entries (2311.03099), merged by the signs as in `ties` (2306.01708; PEFT)."""
    drop = sparse.dropped(density)
    return joined(lambda xs, key: mean_by_count(drop(xs, key), weights, majority), members, key=key)


def dare_linear_mergekit(
    members: Members, weights: Array, *, key: Array, density: Density = 1.0
) -> Array:
    """DARE (2311.03099) as mergekit has it: rescaled to each module's sum of magnitudes."""
    drop = sparse.rescaled(members, sparse.dropped(density), key)
    return joined(lambda xs, key: weighted(drop(xs, key), weights), members, key=key)


def dare_ties_mergekit(
    members: Members,
    weights: Array,
    *,
    key: Array,
    density: Density = 1.0,
    majority: str = "total",
) -> Array:
    """The same (2311.03099), of entries whose sign the weighted modules elect; no division."""
    drop = sparse.rescaled(members, sparse.dropped(density), key)

    def formula(xs: Array, key: Array) -> Array:
        """The agreeing sum of a block."""
        return sum_by_weight(drop(xs, key), weights, majority, normalize=False)

    return joined(formula, members, key=key)


def breadcrumbs(
    members: Members, weights: Array, *, density: Density = 1.0, gamma: Density = 0.01
) -> Array:
    """Model Breadcrumbs: the weighted sum of entries neither large (`gamma` of them) nor small.

    Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks"
    (2312.06795), section 3; a `density` of entries is left, which makes β = 1 - density - γ.
    """
    mask = sparse.without_outliers(members, density, gamma)
    return joined(lambda xs: weighted(mask(xs), weights), members)


def breadcrumbs_ties(
    members: Members,
    weights: Array,
    *,
    density: Density = 1.0,
    gamma: Density = 0.01,
    majority: str = "total",
) -> Array:
    """The same (2312.06795), of entries whose sign the weighted modules elect; not divided.

    As mergekit has it, which elects as TIES does (2306.01708).
    """
    mask = sparse.without_outliers(members, density, gamma)
    return joined(lambda xs: sum_by_weight(mask(xs), weights, majority, normalize=False), members)


def fisher(members: Members, weights: Array, *, fishers: Members) -> Array:
    """Σ wᵢFᵢxᵢ / Σ wᵢFᵢ: each entry averaged by how much each module's loss depends on it.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2111.09832), equation 4. Fᵢ
    is the diagonal of the Fisher information, in the form of the members; where all are 0 the
    modules are averaged by their weights.
    """

    def formula(xs: Array, fs: Array) -> Array:
        """The average of a block."""
        shares = weighted(fs, weights)
        there = shares != 0
        plain = ratio(weighted(xs, weights), jnp.sum(weights))
        return jnp.where(there, weighted(fs * xs, weights) / jnp.where(there, shares, 1), plain)

    return joined(formula, members, fishers)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "ties_mergekit": ties_mergekit,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "dare_linear_mergekit": dare_linear_mergekit,
    "dare_ties_mergekit": dare_ties_mergekit,
    "della": della,
    "della_mergekit": della_mergekit,
    "della_linear_mergekit": della_linear_mergekit,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "slerp": slerp,
    "fisher": fisher,
    "negmerge": negmerge,
    "wudi_adam": wudi_adam,
}

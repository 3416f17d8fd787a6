"""Merging entry by entry in bases that the modules share: KnOTS, Core Space, compress-then-merge.

Each is a function of one projection at one layer: `members` is a LoRA with the axis M in front, and
the result is a LoRA without it. `inner` names the entrywise method that merges the coordinates; it
gets the weights, the remaining options, and `key` if it draws by lot. With inner="linear" KnOTS and
Core Space are the exact weighted sum. Modules of lower rank than the others count as of theirs: a
density is one of all coordinates, of which padding makes some zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from compose.decompositions import ratio, significant, svd, wide
from compose.merging.cores import bases, product
from compose.merging.elementwise import ELEMENTWISE
from compose.option_values import refuse_faults
from lora_jax.modules import LoRA

Array = jax.Array


def knots(
    members: LoRA,
    weights: Array,
    *,
    inner: str = "ties",
    scaled: bool = True,
    key: Array | None = None,
    **options: Any,
) -> LoRA:
    """KnOTS: what the modules do in output directions that all share, merged entry by entry.

    Stoica et al., "Model Merging with SVD to Tie the Knots" (2410.19735):
    [Δ₁; …; Δ_M] = [V₁; …; V_M]·S·Uᵀ with one U (O, L) for all, and Δ = merge(V₁S, …, V_M S)·Uᵀ.
    S goes into the parts before they are merged, as in the released code's settings; with
    scaled=False after, as in the paper's equation. M·I·L entries are merged.
    """
    merge = _entrywise(inner, key, options)
    left, cores, right = bases(members)
    v, s, ut = svd(rearrange(cores, "M K L -> (M K) L"))
    v = rearrange(v * significant(s, max(v.shape)), "(M K) L -> M K L", M=len(cores))
    parts = left @ (v * s if scaled else v)
    merged = merge(parts, weights)
    return product(merged if scaled else merged * s, ut @ right, members)


def core_space(
    members: LoRA,
    weights: Array,
    *,
    inner: str = "ties",
    key: Array | None = None,
    **options: Any,
) -> LoRA:
    """Core Space: cores of M·R x M·R that hold each delta exactly, merged entry by entry.

    Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space" (2509.17786):
    the bases are the singular vectors of all a's and of all b's side by side.
    """
    merge = _entrywise(inner, key, options)
    left, cores, right = bases(members)
    u = _principal(rearrange(wide(members.a), "M I R -> I (M R)"), left)
    v = _principal(rearrange(wide(members.b), "M R O -> O (M R)"), right.T)
    merged = merge(u.T @ cores @ v, weights)
    return product(left @ u @ merged, v.T @ right, members)


def _principal(stacked: Array, basis: Array) -> Array:
    """The left singular vectors of a matrix (I, M·R), in coordinates of its basis (I, K)."""
    return svd(basis.T @ stacked)[0]


def compress_then_merge(
    members: LoRA,
    weights: Array,
    *,
    inner: str = "ties",
    shared_rank: int | None = None,
    beta: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-6,
    key: Array | None = None,
    **options: Any,
) -> LoRA:
    """Compress-then-Merge: coordinates in the one basis pair that holds most of all modules.

    He et al. (2606.03723): a Tucker-2 decomposition (higher-order orthogonal iteration) of the
    deltas, each first scaled to `beta` times its own norm plus 1 - beta times the mean norm, gives
    U (I, r) and V (O, r); the cores UᵀΔᵢV are merged entry by entry. The result has rank r =
    `shared_rank`, R unless given. It is found when an iteration betters the relative error by less
    than `tolerance`. Gradients see the bases as constants; they do not depend on the weights.
    """
    merge = _entrywise(inner, key, options)
    rank = members.a.shape[-1] if shared_rank is None else shared_rank
    refuse_faults(shared_rank=rank)
    left, cores, right = bases(members)
    norms = jnp.linalg.norm(cores, axis=(1, 2), keepdims=True)
    even = cores * (beta + (1 - beta) * ratio(jnp.mean(norms), norms))
    u, v = _tucker(jax.lax.stop_gradient(even), min(rank, *cores.shape[1:]), iterations, tolerance)
    merged = merge(u.T @ cores @ v, weights)
    return product(left @ u @ merged, v.T @ right, members)


def _tucker(cores: Array, rank: int, iterations: int, tolerance: float) -> tuple[Array, Array]:
    """The orthonormal u (K, r) and v (L, r) that keep most of Σᵢ ‖uᵀ coresᵢ v‖²."""
    whole = jnp.sum(cores**2)

    def better(state):
        """One round: each basis the best for the other."""
        n, u, _, kept, _ = state
        v = _leading(u.T @ cores, rank, "M r L -> L (M r)")
        u = _leading(cores @ v, rank, "M K r -> K (M r)")
        return n + 1, u, v, jnp.sum((u.T @ cores @ v) ** 2), kept

    def going(state):
        """Whether the last round still changed the relative error."""
        n, _, _, kept, before = state
        now, then = (jnp.sqrt(jnp.maximum(ratio(whole - x, whole), 0)) for x in (kept, before))
        return (n < 2) | ((n < iterations) & (jnp.abs(now - then) >= tolerance))

    u = _leading(cores, rank, "M K L -> K (M L)")
    v = _leading(cores, rank, "M K L -> L (M K)")
    start = (0, u, v, jnp.zeros_like(whole), jnp.zeros_like(whole))
    return jax.lax.while_loop(going, better, start)[1:3]


def _leading(x: Array, rank: int, unfold: str) -> Array:
    """The first left singular vectors of an unfolded array."""
    return svd(rearrange(x, unfold))[0][:, :rank]


def _entrywise(inner: str, key: Array | None, options: dict[str, Any]) -> Callable[..., Array]:
    """The entrywise method of that name, with its options."""
    chance = {} if key is None else {"key": key}
    return partial(ELEMENTWISE[inner], **options, **chance)

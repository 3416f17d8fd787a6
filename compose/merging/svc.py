"""Singular value calibration (SVC): what several modules share is not counted several times.

Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" (2602.05536),
equations 4 to 9: a correction of any merged module by the modules that it was merged from. Along
an output direction v of the merged Δ, module i's answer is Δᵢv, and sᵢ = ⟨Δv, Δᵢv⟩ / ‖Δᵢv‖² is how
many times over the merged module gives it. The singular value is divided by the mean of max(α, sᵢ).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from compose import lowrank
from compose.decompositions import svd, wide
from compose.library import stack
from compose.merging.cores import bases, product
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, LoRA, Module, Saved

Array = jax.Array


def svc(members: LoRA, weights: Array, *, alpha: float = 1.0) -> LoRA:
    """The weighted sum, calibrated; `calibrated` does the same to what any other method gave.

    Li et al. (2602.05536), equations 4 to 9.
    At alpha = 1 nothing grows: orthogonal modules are summed, equal ones averaged. A smaller alpha
    (the authors' command has 0.1) makes larger what only some of the modules have.
    """
    left, cores, right = bases(members)
    u, s, vt = svd(jnp.einsum("M,MKL->KL", weights, cores))
    gain = _gain(u * s, cores @ vt.T, jnp.linalg.norm(cores, axis=(1, 2)), alpha)
    return product(left @ (u * (gain * s)), vt @ right, members)


def svc_vector(members: Array, weights: Array, *, alpha: float = 1.0) -> Array:
    """The weighted sum of IA3 offsets (M, F), calibrated: a vector has one gain for all of it.

    The paper (2602.05536) names this form; no released code has it.
    """
    return _scaled(jnp.einsum("M,MF->F", weights, members), members, alpha)


def _scaled(merged: Array, members: Array, alpha: float) -> Array:
    """A merged vector (F,) calibrated by the members (M, F)."""
    sizes = jnp.linalg.norm(members, axis=-1)
    return merged * _gain(merged[:, None], members[..., None], sizes, alpha)


def _gain(merged: Array, answers: Array, sizes: Array, alpha: float) -> Array:
    """γ (r): M / Σᵢ max(α, sᵢ) for the merged answers (K, r) and each module's (M, K, r).

    An answer that is only rounding, for a module of that size (M,), counts as none.
    """
    squares = jnp.sum(answers**2, axis=1)
    floor = 10 * answers.shape[1] * jnp.finfo(answers.dtype).eps * sizes[:, None]
    there = squares > floor**2
    s = jnp.einsum("Kr,MKr->Mr", merged, answers) / jnp.where(there, squares, 1)
    return len(answers) / jnp.sum(jnp.maximum(alpha, jnp.where(there, s, 0)), axis=0)


def calibrated(merged: Adapter, adapters: Sequence[Adapter], *, alpha: float = 1.0) -> Adapter:
    """A module, calibrated by those it was merged from, by whatever method.

    LoRA projections keep their rank; weights kept whole stay as they are. Ranks and scales may
    differ between the modules.
    """
    if lost := sorted(merged.keys() - {path for adapter in adapters for path in adapter}):
        raise InputError(f"{', '.join(lost)}: changed by the merged module and by no other")
    together = stack([{p: m for p, m in adapter.items() if p in merged} for adapter in adapters])
    return {path: _calibrated(path, m, together[path], alpha) for path, m in merged.items()}


def _calibrated(path: str, merged: Module, members: Module, alpha: float) -> Module:
    """One projection's module; `members` has the axis M before the layers'."""
    match merged, members:
        case LoRA(bias=None), LoRA(bias=None):
            u, s, vt = lowrank.svd(merged)
            a, b, sizes = wide(members.a), members.scale * wide(members.b), lowrank.norm(members)
            a, b, sizes = (jnp.moveaxis(x, 0, s.ndim - 1) for x in (a, b, sizes))
            layers = u * s[..., None, :], vt, a, b, sizes
            one = partial(_gain_of_layer, alpha=alpha)
            gains = one(layers) if s.ndim == 1 else jax.lax.map(one, layers)
            return product(u * (gains * s)[..., None, :], vt, merged)
        case IA3(), IA3():
            scaled = jnp.vectorize(partial(_scaled, alpha=alpha), signature="(F),(M,F)->(F)")
            offsets = jnp.moveaxis(members.offset, 0, -2)
            return replace(merged, offset=scaled(merged.offset, offsets))
        case Saved(), _:
            return merged
    raise InputError(f"{path}: only IA3 and LoRA without a bias can be calibrated")


def _gain_of_layer(layer: tuple[Array, ...], alpha: float) -> Array:
    """γ (r) of one layer: U·S (I, r), Vᵀ (r, O), a (M, I, R), b (M, R, O) and sizes (M,)."""
    merged, vt, a, b, sizes = layer
    with jax.default_matmul_precision("highest"):
        return _gain(merged, a @ (b @ vt.T), sizes, alpha)

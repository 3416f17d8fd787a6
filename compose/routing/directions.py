"""What a module's delta says about the tokens it is for: its strongest input directions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from compose.lowrank import svd
from lora_jax.modules import LoRA

Array = jax.Array
Factors = Mapping[str, tuple[Array, Array]]  # a (..., I, R) and b (..., R, O), by projection

# Projections of one layer that read the same input, by their last names.
_ALIKE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_NOISE = 1e-6  # a singular value below this share of the largest is rounding, not a direction


def prototypes(a: Array, b: Array) -> Array:
    """The unit input directions (..., I) that the deltas a·b amplify most; zero for a zero delta.

    The top left singular vector, exact, by QR of the factors; its largest entry is positive.
    """
    u, s, _ = svd(LoRA(a, b))
    return jnp.where(s[..., :1] > 0, u[..., 0], 0)


def own_prototypes(factors: Factors) -> dict[str, Array]:
    """The prototypes (..., I) of every projection by itself."""
    return {path: prototypes(a, b) for path, (a, b) in factors.items()}


def shared_prototypes(factors: Factors) -> dict[str, Array]:
    """The prototypes (..., I) where queries, keys and values have one together, as MTTL ties them.

    It is the direction that their deltas side by side, [Δq Δk Δv], amplify most. MTTL asks for one
    `a` for all three; here each may have its own.
    """
    found = {}
    for group in _groups(factors):
        whole = prototypes(*_side_by_side([factors[path] for path in group]))
        found |= dict.fromkeys(group, whole)
    return {path: found[path] for path in factors}


def _groups(paths: Mapping[str, object]) -> list[list[str]]:
    """The projections, those together that read the same input."""
    groups: dict[tuple[str, int], list[str]] = {}
    for number, path in enumerate(paths):
        block, _, name = path.rpartition(".")
        kind = next((n for n, names in enumerate(_ALIKE) if name in names), None)
        crossing = name == "q" and block.endswith("EncDecAttention")  # reads the decoder
        alone = kind is None or crossing
        groups.setdefault((block, -1 - number if alone else kind), []).append(path)
    return list(groups.values())


def _side_by_side(factors: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The factors of the deltas [Δ₁ Δ₂ ...] along their outputs."""
    if len(factors) == 1:
        return factors[0]
    widths = [b.shape[-1] for _, b in factors]
    rows = []
    for number, (_, b) in enumerate(factors):
        before, after = sum(widths[:number]), sum(widths[number + 1 :])
        rows.append(jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(before, after)]))
    a = jnp.concatenate([a for a, _ in factors], axis=-1)
    return a, jnp.concatenate(rows, axis=-2)


def spectral(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The same delta as u (..., I, R), s (..., R) and s·vᵀ (..., R, O), from its SVD u·s·vᵀ.

    Ranks that only rounding fills are zero in all three.
    """
    u, s, vt = svd(LoRA(a, b))
    s = jnp.where(s > _NOISE * s[..., :1], s, 0)
    return jnp.where(s[..., None, :] > 0, u, 0), s, s[..., None] * vt

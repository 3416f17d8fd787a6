"""Forgetting by merging: what is to be taken out of a model, without what else comes with it."""

import jax
import jax.numpy as jnp

from compose.merging.cores import columns, product
from compose.merging.members import Members, joined
from compose.merging.sparse import per_member
from lora_jax.modules import LoRA

Array = jax.Array


def ext_sub(members: LoRA, weights: Array) -> LoRA:
    """Ext-Sub: the first module, the expert, less what of the others, anti-experts, is not shared.

    Hu et al., "Separate the Wheat from the Chaff: Model Deficiency Unlearning via Parameter-
    Efficient Module Operation" (2308.08090), on deltas: for each output, with the input vectors x
    of the expert and y of an anti-expert and c the unit vector along x/‖x‖ + y/‖y‖, the result is
    x - (y - ⟨y, c⟩c). An anti-expert's weight is its strength, the expert's multiplies x. Exact:
    the factors b are only rescaled, output by output.
    """
    left, xs = columns(members)
    return product(left, _extracted(xs, weights), members)


def ext_sub_vector(members: Array, weights: Array) -> Array:
    """The same of IA3 offsets (M, F), where the vectors are the offsets themselves.

    The released code has the strength on ⟨y, c⟩c alone; here it is on both terms, as for LoRA.
    """
    return _extracted(members[..., None], weights)[:, 0]


def _extracted(xs: Array, weights: Array) -> Array:
    """w₀x - Σ wᵢ(yᵢ - ⟨yᵢ, c⟩c) (K, O) of vectors that are columns of (M, K, O), x the first."""
    x, others = _units(xs[:1], 0), _units(xs[1:], 0)
    both = _units(x + others, 10 * xs.shape[1] * float(jnp.finfo(xs.dtype).eps))  # less: rounding
    shared = jnp.sum(xs[1:] * both, axis=1, keepdims=True) * both
    return weights[0] * xs[0] - jnp.einsum("M,MKO->KO", weights[1:], xs[1:] - shared)


def _units(xs: Array, least: float) -> Array:
    """Columns (M, K, O) at length 1, and 0 where they are no longer than `least`."""
    squares = jnp.sum(xs**2, axis=1, keepdims=True)
    there = squares > least**2
    return xs * jnp.where(there, jax.lax.rsqrt(jnp.where(there, squares, 1)), 0)


def negmerge(members: Members, weights: Array) -> Array:
    """NegMerge: the mean of the modules' entries where all have one sign, and 0 elsewhere.

    Kim et al., "NegMerge: Sign-Consensual Weight Merging for Machine Unlearning" (2410.05583):
    the modules learn one thing to be forgotten, from several settings of training. The
    result is what is then subtracted; as every merge of one module at weight 1, it is no negation.
    """

    def agreed(xs: Array) -> Array:
        """The formula on the stacked tensors (M, ...)."""
        xs = per_member(weights, xs) * xs
        same = jnp.abs(jnp.sum(jnp.sign(xs), axis=0)) == len(xs)
        return jnp.where(same, jnp.mean(xs, axis=0), 0)

    return joined(agreed, members)

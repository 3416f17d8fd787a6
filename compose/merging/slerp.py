"""SLERP: two modules mixed along the arc between them.

Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH 1985), of flattened tensors as in
mergekit, which takes whole weights where these are the modules' own tensors.
"""

from functools import partial

import jax
import jax.numpy as jnp

from compose import lowrank
from compose.decompositions import wide
from compose.merging.members import Members, joined, per_member, weighted
from compose.merging.sparse import Number
from lora_jax.errors import InputError
from lora_jax.modules import LoRA

Array = jax.Array
COLINEAR = 0.9995  # a cosine beyond which the arc is taken for a straight line, as in mergekit


def slerp(members: Members, weights: Array, *, t: Number = 0.5) -> Array:
    """The tensor at `t` between the first module's (0) and the second's (1), each times its weight.

    Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH 1985).
    The angle between them is divided as t says; lengths go from one's to the other's. One module
    alone stays itself.
    """
    shares = _shares(members, weights, t)
    return joined(lambda xs: weighted(xs, shares), members)


def slerp_deltas(members: LoRA, weights: Array, *, t: Number = 0.5) -> LoRA:
    """The same as a LoRA, exactly: a weighted sum, its weights found from the factors.

    Shoemake (SIGGRAPH 1985), as for tensors.
    """
    return weighted_deltas(members, _shares(members, weights, t))


def weighted_deltas(members: LoRA, weights: Array) -> LoRA:
    """The sum of weighted deltas, exactly; ranks add up."""
    b = members.scale * per_member(weights, members.b) * wide(members.b)
    a = jnp.concatenate(list(members.a), axis=-1)
    return LoRA(a, jnp.concatenate(list(b), axis=-2).astype(members.b.dtype))


def _shares(members: Members, weights: Array, t: Number) -> Array:
    """What the modules (M,) are to be multiplied by."""
    count = len(weights)
    if count > 2:
        raise InputError(f"slerp lies between two modules; got {count}: merge two, then the next")
    if count == 1:
        return weights
    products = _products(members) * weights * weights[:, None]
    lengths = jnp.sqrt(products[0, 0] * products[1, 1])
    cosine = products[0, 1] / jnp.where(lengths > 0, lengths, 1)
    straight = jnp.abs(cosine) > COLINEAR
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    arc = jnp.sin(angle * jnp.stack([1 - t, t])) / jnp.sin(angle)
    return weights * jnp.where(straight, jnp.stack([1 - t, t]), arc)


def _products(members: Members) -> Array:
    """The inner products (M, M) of the members' tensors."""
    if not isinstance(members, LoRA):
        flat = wide(members).reshape(len(members), -1)
        with jax.default_matmul_precision("highest"):
            return flat @ flat.T
    rows, columns = (jax.tree.map(partial(jnp.expand_dims, axis=n), members) for n in (0, 1))
    return lowrank.inner(rows, columns)

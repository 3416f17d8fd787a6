"""Which entries of modules' tensors a merging method drops, and how it rescales the rest.

Each takes the members (`compose.merging.members`) and gives a function from a block of the stacked
tensors (M, *S), and the block's key where chance plays a part, to the block with entries at zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compose.merging import magnitude
from compose.merging.members import Members, each, per_member, size_of, summed
from compose.option_values import refuse_faults

Array = jax.Array
Number = float | Array
Density = magnitude.Density
Sparse = Callable[..., Array]


def trimmed(members: Members, density: Density) -> Sparse:
    """Each tensor's largest entries, a `density` of them, by magnitude; ties are kept."""
    refuse_faults(density=density)
    if _whole(density):
        return lambda xs: xs
    count = magnitude.kept(density, size_of(members))
    floors = each(lambda x: magnitude.floor(x, count), members)
    return lambda xs: jnp.where(_reach(xs, floors), xs, 0)


def without_outliers(members: Members, density: Density, gamma: Density) -> Sparse:
    """Each tensor's middling entries: neither the `gamma` largest nor the smallest.

    A `density` of entries is left; where both cannot be had, fewer of the largest are dropped.
    """
    refuse_faults(density=density, gamma=gamma)
    if _whole(density):
        return lambda xs: xs
    size = size_of(members)
    left = magnitude.kept(density, size)
    top = jnp.minimum(magnitude.kept(gamma, size), size - left)
    floors = each(lambda x: magnitude.floor(x, top + left), members)
    ceilings = each(lambda x: magnitude.floor(x, top), members)
    return lambda xs: jnp.where(_reach(xs, floors) & ~_reach(xs, ceilings), xs, 0)


def _reach(xs: Array, floors: Array) -> Array:
    """Which entries of (M, *S) reach their tensor's magnitude (M,)."""
    return jnp.abs(xs).astype(jnp.float32) >= per_member(floors, xs)


def dropped(density: Density) -> Sparse:
    """Entries kept with probability `density`, by lot, and divided by it."""
    refuse_faults(density=density)
    if _whole(density):
        return lambda xs, key: xs
    share = magnitude.value_of(density)
    return lambda xs, key: jnp.where(_lot(key, share, xs), xs / share, 0)


def rescaled(members: Members, sparse: Sparse, key: Array, *, columns: bool = False) -> Sparse:
    """`sparse`, each tensor multiplied so that its magnitudes add up to what they did before."""

    def sums(xs: Array, key: Array) -> Array:
        """The sums of magnitudes (2, M) of a block before and after."""
        axes = tuple(range(1, xs.ndim))
        return jnp.stack([jnp.sum(jnp.abs(x), axis=axes) for x in (xs, sparse(xs, key))])

    before, after = summed(sums, members, key=key, columns=columns)
    gain = jnp.where((before < TINY) | (after < TINY), 1, before / jnp.where(after > 0, after, 1))
    return lambda xs, key: sparse(xs, key) * per_member(gain, xs)


TINY = 1e-7  # a tensor whose magnitudes add up to less is left as it is, as in mergekit


def _lot(key: Array, chance: float | Array, xs: Array) -> Array:
    """Which entries of (M, *S) are drawn, each with its `chance`."""
    return jax.random.bernoulli(key, chance, xs.shape)


def _whole(density: Density) -> bool:
    """Whether it is known that nothing is dropped."""
    return isinstance(density, float | int) and density >= 1

"""Mixtures whose weights are known beforehand: of an oracle, of a probe, or anyone's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compose.library import Library
from compose.option_values import refuse_faults
from compose.routing.build import factors, given
from compose.routing.settings import refuse_other_kinds
from lora_jax.errors import InputError
from lora_jax.modules import Experts

Array = jax.Array


def with_weights(
    library: Library, weights: Array, *, top_k: int | None = None, mixing: str = "outputs"
) -> dict[str, Experts]:
    """The library mixed by `weights` (M,), or (B, M) for each row of a batch, at every projection.

    `top_k` says how many of a row's weights are not zero, at most: then only those modules are
    computed where that is the cheaper. "outputs" mixing is the modules' weighted sum.
    """
    refuse_other_kinds(library)
    count = len(library.names)
    top_k = count if top_k is None else top_k
    if weights.ndim not in (1, 2) or weights.shape[-1] != count:
        raise InputError(f"weights must be (M,) or (B, M), M being {count}; got {weights.shape}")
    refuse_faults(mixing=mixing)
    if not 1 <= top_k <= count:
        raise InputError(f"top_k must lie between 1 and the library's {count} modules; got {top_k}")
    return given(factors(library.adapters), weights, mixing, top_k)


def oracle(library: Library, chosen: str | Sequence[str]) -> dict[str, Experts]:
    """The library routed by one who knows: to the module of this name, or to each row's by name."""
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if lost := sorted(set(names) - set(library.names)):
        raise InputError(f"no module {', '.join(lost)}; there are {', '.join(library.names)}")
    rows = jax.nn.one_hot(
        jnp.array([library.names.index(name) for name in names]), len(library.names)
    )
    return with_weights(library, rows[0] if isinstance(chosen, str) else rows, top_k=1)

"""Merging modules into one by any of the methods, projection by projection, layer by layer.

In delta space the methods work on what modules do: from the factors where that is exact, else on
dense deltas of one layer at a time, each brought down to a low rank at once. In factor space they
work on a's and on b's apart, as PEFT's do; there a lone module has its delta times its weight.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax

from compose import lowrank
from compose.align import by_projection
from compose.arithmetic import Space, delta_sum
from compose.merging.methods import SUMS, draws
from compose.merging.places import Place, merged_at
from compose.merging.refusals import refuse_unfit
from compose.weights import Weights, at
from lora_jax.modules import Adapter, LoRA, Module

Array = jax.Array
Errors = dict[str, Array]


def merge(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Weights | None = None,
    space: Space = "delta",
    rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Adapter, Errors]:
    """The modules merged by one of `methods.METHODS`, and each LoRA's relative errors (N,).

    The error is what bringing a delta down to `rank` lost of it, in the Frobenius norm. Unless
    given, the rank is the modules' ranks' sum; for "svd" the largest of them, as in PEFT; spectral
    methods know their own. Weights are 1 unless given, and may be one a layer, or by projection. A
    projection that a module leaves alone counts as zero there, ranks are padded with zeros, and
    `seed` decides what is left to chance, for each layer and projection. The options are the
    method's; those that are arrays may be traced. For "fisher", `fishers` are the modules' diagonal
    Fisher information in the modules' own form (`train.fisher`); in delta space each a LoRA of any
    rank whose product it is.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    refuse_unfit(adapters, method, weights, space, rank, options)
    if method in SUMS and (space == "delta" or method != "linear"):
        return _summed(adapters, method, weights, rank)
    given = dict(options)
    fishers = given.pop("fishers", None)
    chance = jax.random.key(seed) if draws(method, options.get("inner")) else None
    merged, errors = {}, {}
    for path in by_projection(adapters):
        place = Place(
            path,
            [_only(path, adapter) for adapter in adapters],
            None if fishers is None else [_only(path, fisher) for fisher in fishers],
            [at(weight, path) for weight in weights],
            None if chance is None else jax.random.fold_in(chance, zlib.crc32(path.encode())),
            given,
        )
        merged[path], error = merged_at(place, method, space, rank)
        errors |= {} if error is None else {path: error}
    return merged, errors


def _only(path: str, adapter: Adapter) -> Adapter:
    return {path: adapter[path]} if path in adapter else {}


def _summed(
    adapters: Sequence[Adapter], method: str, weights: Weights, rank: int | None
) -> tuple[Adapter, Errors]:
    """The weighted sum, exact up to the rank that it is brought down to."""
    table, merged, errors = by_projection(adapters), {}, {}
    for path, module in delta_sum(adapters, weights).items():
        merged[path] = module
        if isinstance(module, LoRA):
            ranks = _ranks(table[path])
            limit = rank or (max(ranks) if method == "svd" else sum(ranks))
            merged[path], errors[path] = lowrank.recompress(module, limit)
    return merged, errors


def _ranks(modules: Sequence[Module | None]) -> list[int]:
    """The ranks of the modules that there are."""
    return [module.a.shape[-1] for module in modules if isinstance(module, LoRA)]

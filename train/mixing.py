"""Learned mixing: the weights of a sum of modules are trained, and the modules stay as they are.

Global, by layer (CAT: "LoRA Soups", 2410.13025; AdaMerging's layer-wise form, 2310.02575) or by
projection too. What is trained for is the run's objective, a few labelled rows or the entropy on
unlabelled text; what is trained with is everything else that a run has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from compose import arithmetic, geometry
from compose.inputs import load_input, located, named_folders
from compose.library import Library
from compose.summary import members
from compose.weights import Weights
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, Saved
from train.config import Config, Mixing
from train.subject import Subject


@dataclass(frozen=True)
class Mix:
    """The modules that a run mixes, by name, and the folders they came from."""

    names: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    folders: dict[str, Path]


def load_mix(config: Config, model: models.Config) -> Mix:
    """The modules that `--mix.of` names; a library stands for its members."""
    folders = {name: located(given) for name, given in named_folders(config.mix.of).items()}
    loaded = {name: load_input(folder, model) for name, folder in folders.items()}
    rows = [row for name, value in loaded.items() for row in members(name, value)]
    if len(rows) < 2:
        raise InputError(f"--mix.of names {len(rows)} module; there are two at least to be mixed")
    names, adapters = zip(*rows, strict=True)
    arithmetic.weighted_sum(adapters, [1.0] * len(rows), space="delta")  # refuses what cannot be
    return Mix(names, adapters, folders)


def first_weights(mixing: Mixing, adapters: Sequence[Adapter]) -> Any:
    """The weights before the first step, all alike: (M,), (M, N), or by projection (M, N).

    Their sum is 1 unless `--mix.start` says how large each is.
    """
    start = 1 / len(adapters) if mixing.start is None else mixing.start
    modules = {path: module for adapter in adapters for path, module in adapter.items()}
    depths = {
        path: () if isinstance(module, Saved) else jax.tree.leaves(module)[0].shape[:1]
        for path, module in modules.items()
    }
    if mixing.per == "projection":
        return {path: jnp.full((len(adapters), *depth), start) for path, depth in depths.items()}
    if mixing.per == "module":
        return jnp.full(len(adapters), start)
    if len(found := set(depths.values())) > 1:
        told = ", ".join(f"{path} {depth}" for path, depth in depths.items())
        remedy = "take --mix.per projection"
        raise InputError(f"--mix.per layer: the projections differ in depth ({told}); {remedy}")
    return jnp.full((len(adapters), *found.pop()), start)


def mixed(adapters: Sequence[Adapter], weights: Any, space: str) -> Adapter:
    """The sum of the modules under their weights: of deltas, or LoRAHub's, factor by factor.

    LoRAHub (2307.13269): a = Σ wᵢaᵢ and b = Σ wᵢbᵢ, signs on both.
    """
    rows: Weights = weights
    if isinstance(weights, dict):
        rows = [{path: w[n] for path, w in weights.items()} for n in range(len(adapters))]
    if space == "factor":
        return arithmetic.factor_sum(adapters, list(rows), sign="ab")
    return arithmetic.delta_sum(adapters, list(rows))


@cache
def mixing_subject(mixing: Mixing) -> Subject:
    """How a run trains mixing weights; what is frozen is the base and the modules.

    The same for the same settings, so that runs alike share their programs.
    """

    def applied(frozen: Any, weights: Any) -> tuple[Any, Adapter]:
        """The base's weights and the module that the mixing weights make."""
        base, adapters = frozen
        return base, mixed(adapters, weights, mixing.space)

    return Subject(applied, partial(penalty, mixing.penalty), mixing.bound or None)


def penalty(share: float, weights: Any) -> jax.Array:
    """`share` times the mean size of the weights; LoRAHub's regulariser at 0.05."""
    sizes = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(weights)])
    return share * jnp.mean(sizes)


def mixed_module(mixing: Mixing, mix: Mix, weights: Any) -> tuple[Adapter, dict[str, Any]]:
    """The mixed module, at `--mix.rank` if that is given, and the errors of recompression."""
    adapter = mixed(mix.adapters, weights, mixing.space)
    if not mixing.rank:
        return adapter, {}
    small, errors = geometry.recompress_members(adapter, mixing.rank)
    assert not isinstance(small, Library)
    return small, errors[""]

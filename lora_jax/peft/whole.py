"""Base weights that go with an adapter whole: PEFT's modules_to_save, and trained biases."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.modules import Saved
from lora_jax.peft import names
from lora_jax.peft.names import Weight

Tensors = Mapping[str, np.ndarray]


def as_here(weights: Mapping[str, Weight], stored: Tensors) -> dict[str, Saved]:
    """Stored base weights by path, as the base holds them: stacked, and kernels (in, out)."""
    paths: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if name in stored:
            paths.setdefault(weight.path, []).append(name)
    return {
        path: Saved(jnp.asarray(_stacked(weights, stacked, stored)))
        for path, stacked in paths.items()
    }


def _stacked(weights: Mapping[str, Weight], layers: Sequence[str], stored: Tensors) -> np.ndarray:
    """One weight from what is stored of it."""
    leaf = weights[layers[0]].leaf
    tensors = [stored[name].T if leaf.transposed else stored[name] for name in layers]
    return np.stack(tensors) if leaf.stacked else tensors[0]


def as_stored(saved: Mapping[str, Saved], config: models.Config) -> dict[str, np.ndarray]:
    """The weights that an adapter keeps, by their names in a checkpoint and turned as there."""
    found = {}
    for name, weight in names.weights(config).items():
        if weight.path in saved:
            value = np.asarray(saved[weight.path].value, np.float32)
            value = value[weight.layer] if weight.leaf.stacked else value
            found[name] = value.T if weight.leaf.transposed else value
    return found


def biases(stored: Iterable[str]) -> set[str]:
    """The stored weights that are biases of modules which are not stored themselves."""
    stored = set(stored)
    return {
        name
        for name in stored
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in stored
    }


def settings(stored: Tensors, targets: Iterable[str], config: models.Config) -> dict[str, Any]:
    """What adapter_config.json says of the weights stored whole: "bias" and "modules_to_save"."""
    bare, known = biases(stored), names.weights(config)
    own = {f"{module}.bias" for module in targets} & known.keys()
    modules = {_root(name, stored, known) for name in stored if name not in bare}
    kind = ("lora_only" if bare == own else "all") if bare else "none"
    return {"bias": kind, "modules_to_save": sorted(modules) or None}


def _root(name: str, stored: Tensors, known: Mapping[str, Weight]) -> str:
    """The module of a weight: the whole head of a classifier, say, where all of it is stored."""
    first = name.partition(".")[0]
    inside = {other for other in known if other.startswith(f"{first}.")}
    return first if inside <= stored.keys() else name.rpartition(".")[0]


def problems(
    saved: Mapping[str, Saved], stored: Tensors, asked: Mapping[str, Any], config: models.Config
) -> list[str]:
    """What PEFT's format cannot hold of the weights that an adapter keeps."""
    known = names.weights(config)
    shares = {path for path, module in saved.items() if module.share is not None}
    found = [
        f"{name} was kept whole by some of what was added up, but not once in all, for which PEFT "
        f"has no form; merge the sum into the base (--merged)"
        for name, weight in known.items()
        if weight.path in shares
    ]
    found += [
        f"{name} is kept without its bias"
        for name in stored
        if (bias := f"{name.removesuffix('weight')}bias") in known and bias not in stored
    ]
    every = {name for name in known if name.endswith(".bias")}
    if asked["bias"] == "all" and not every <= stored.keys():
        kept = len(every & stored.keys())
        found.append(f"{kept} biases are kept: keep all {len(every)}, or those of LoRA's own")
    return found

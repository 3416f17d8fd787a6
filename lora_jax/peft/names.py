"""What Hugging Face calls a base model's modules and weights, and PEFT an adapter's tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_jax import models
from lora_jax.table import Leaf, Table, module_path

PREFIX = "base_model.model."
MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"  # roles of tensors, as are "lora_A", ...


@dataclass(frozen=True)
class Slot:
    """A place for a module: one layer of a projection, or a projection that the model has once."""

    path: str  # an adapter's key
    stacked: bool  # whether every layer has one
    size: tuple[int, int]  # (in, out)
    embedding: bool = False  # a table of embeddings, which takes another kind of LoRA
    linear: bool = True  # "all-linear" means it


def table(config: Any) -> Table:
    """The weight table, with the unembedding also where it is the embedding."""
    return models.table(replace(config, tied=False) if config.tied else config)


def slots(config: models.Config) -> dict[str, Slot]:
    """Every module that an adapter can change, by Hugging Face's name."""
    return {
        name.removesuffix(".weight"): _slot(key, leaf)
        for key, leaf in table(config).items()
        if _takes_modules(key, leaf)
        for name in leaf.names()
    }


def _takes_modules(key: str, leaf: Leaf) -> bool:
    """Whether a weight is the kernel of a projection, or a table of tokens."""
    if leaf.stacked:
        return len(leaf.shape) == 3
    return key in ("embed", "unembed") or (leaf.new is not None and len(leaf.shape) == 2)


def _slot(key: str, leaf: Leaf) -> Slot:
    """The place at one weight."""
    size = (leaf.shape[-2], leaf.shape[-1])
    linear = key not in ("embed", "unembed")
    return Slot(module_path(key), leaf.stacked, size, key == "embed", linear)


@dataclass(frozen=True)
class Weight:
    """A weight of the base: one layer's, or the one that there is."""

    path: str
    layer: int
    leaf: Leaf


def weights(config: models.Config) -> dict[str, Weight]:
    """Every weight of the base by its name in a checkpoint."""
    return {
        name: Weight(module_path(key), n, leaf)
        for key, leaf in table(config).items()
        for n, name in enumerate(leaf.names())
    }


_MODULE = re.compile(
    r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(?:\.default)?(?:\.(weight|bias))?"
)
_WEIGHT = re.compile(r"(.+?)(?:\.default)?(\.base_layer)?\.(weight|bias)")
_KEPT = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")  # around a module that is kept whole


def parsed(tensor: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and its role there.

    "lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
    "lora_magnitude_vector" and "ia3_l" are an adapter's; "weight", "bias", "base_layer.weight" and
    "base_layer.bias" the base's own; "" is none.
    """
    name = _KEPT.sub("", tensor.removeprefix(PREFIX))
    if found := _MODULE.fullmatch(name):
        return found[1], f"{found[2]}.bias" if found[3] == "bias" else found[2]
    if found := _WEIGHT.fullmatch(name):
        return found[1], f"{found[2] or ''}.{found[3]}".removeprefix(".")
    return name, ""


def shortest(wanted: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """For each name, its shortest ending after a dot that none of the others has, or all of it."""
    taken = {ending for name in others for ending in endings(name)}
    return {name: next((e for e in endings(name)[:-1] if e not in taken), name) for name in wanted}


def endings(name: str) -> list[str]:
    """A name's endings after a dot, from its last part to all of it; none begins with a number."""
    parts = name.split(".")
    starts = (n for n in reversed(range(len(parts))) if not parts[n].isdigit())
    return [".".join(parts[n:]) for n in starts]


def patterns(numbers: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The number that most modules have, and a pattern to number table that gives the others."""
    values = list(numbers.values())
    usual = max(dict.fromkeys(values), key=values.count)
    table: dict[str, float] = {}
    for value in dict.fromkeys(values):
        if value != usual:
            wanted = [name for name, n in numbers.items() if n == value]
            others = numbers.keys() - set(wanted)
            table |= dict.fromkeys(shortest(wanted, others).values(), value)
    return usual, table

"""The modules that a command was given, one by one, and what their records tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.functions import Value
from compose.inputs import base_and_config, load_input, located, named_folders
from compose.library import Library
from compose.provenance import TRAINED
from compose.summary import members
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.modules import Adapter

MANY = 8  # modules whose pairs still fit on a screen


@dataclass(frozen=True)
class Given:
    """Inputs by name, and all their modules: a library's members as name.member."""

    values: dict[str, Value]
    modules: dict[str, Adapter]
    places: dict[str, Path]  # of each input
    folders: dict[str, Path]  # of each module
    base: str
    config: models.Config


def given(inputs: Sequence[str], base: str | None) -> Given:
    """The modules of `NAME=FOLDER` arguments."""
    return read({n: located(folder) for n, folder in named_folders(inputs).items()}, base)


def read(places: Mapping[str, Path], base: str | None) -> Given:
    """The modules in the folders of adapters and libraries, by name."""
    if not places:
        raise InputError("no module is given; say NAME=FOLDER")
    base, config = base_and_config(base, places)
    values = {name: load_input(folder, config) for name, folder in places.items()}
    modules, folders = {}, {}
    for name, value in values.items():
        inner = value.names if isinstance(value, Library) else ("",)
        for (label, adapter), member in zip(members(name, value), inner, strict=True):
            modules[label], folders[label] = adapter, places[name] / member
    return Given(values, modules, dict(places), folders, base, config)


def run_of(folder: Path) -> dict[str, Any]:
    """The config in the training.json of a module's folder; empty where none can be read."""
    try:
        config = read_json(folder / TRAINED).get("config")
    except (InputError, OSError):
        return {}
    return config if isinstance(config, dict) else {}


def seed_of(folder: Path) -> int | None:
    """The seed of a trained module's initialisation; None where no record tells.

    A run that started from another module, or that mixed modules, drew nothing.
    """
    config = run_of(folder)
    drew = not config.get("start_from") and not (config.get("mix") or {}).get("of")
    seed = config.get("init_seed")
    return seed if drew and isinstance(seed, int) else None

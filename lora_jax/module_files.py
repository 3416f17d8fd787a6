"""Modules of any model to and from a folder: for those that PEFT's format has no names for."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoint import open_safetensors, type_problems
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, read_json, save_tensors, write_json
from lora_jax.modules import IA3, Adapter, DoRA, Experts, LoRA, Module, PerExample, Saved

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (LoRA, DoRA, IA3, Experts, Saved)}
CHOICES = {
    "on": ("output", "input"),
    "mixing": ("outputs", "factors"),
    "score": ("absolute", "signed"),
    "inputs": ("raw", "unit", "standard"),
    "weighting": ("softmax", "uniform", "sigmoid"),
}
ADDED = ("score", "inputs", "weighting", "leading")  # settings that older records do not have
ROUTES = ("prototypes", "spectrum", "shares")
RECORD, WEIGHTS = "modules.json", "modules.safetensors"


def save_modules(folder: Path, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Writes an adapter as a folder, whole or not at all: modules.json beside modules.safetensors.

    A tensor is called by its module's path and its role, "blocks_0.mlp.up.a"; the record has each
    module's kind and plain settings. `load_modules` gives it back bit for bit.
    """
    rows = [path for path, module in adapter.items() if isinstance(module, PerExample)]
    refuse_all([f"{path}: a batch's slots; save their adapters" for path in rows], str(folder))
    record, tensors = {}, {}
    for path, module in adapter.items():
        arrays, settings = _parts(type(module))
        told = {name: type(usual)(getattr(module, name)) for name, usual in settings.items()}
        record[path] = {"kind": type(module).__name__} | told
        held = {f"{path}.{name}": getattr(module, name) for name in arrays}
        tensors |= {name: np.asarray(x) for name, x in held.items() if x is not None}
    refuse_all(_endless(tensors), f"cannot save to {folder}")
    with new_folder(folder, overwrite) as scratch:
        save_tensors(scratch / WEIGHTS, {n: np.ascontiguousarray(x) for n, x in tensors.items()})
        write_json(scratch / RECORD, {"modules": record})


def load_modules(folder: Path) -> dict[str, Module]:
    """The adapter in a folder that `save_modules` wrote; whatever is amiss is told at once."""
    record = read_json(folder / RECORD).get("modules")
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD} has no modules; save_modules writes them")
    with open_safetensors(folder / WEIGHTS) as file:
        refuse_all(type_problems(file, file.keys()), str(folder / WEIGHTS))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    refuse_all(_endless(tensors) + _problems(record, tensors), str(folder))
    return {path: _module(path, told, tensors) for path, told in record.items()}


def _problems(record: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with a record and the tensors beside it."""
    problems, wanted = [], set()
    for path, told in record.items():
        kind = KINDS.get(str(told.get("kind"))) if isinstance(told, dict) else None
        if kind is None:
            problems.append(f"{path} is none of {', '.join(KINDS)}")
            continue
        arrays, settings = _parts(kind)
        wanted |= {f"{path}.{name}" for name in arrays}
        needed = [f"{path}.{name}" for name, usual in arrays.items() if usual is MISSING]
        problems += [f"{name} is missing" for name in needed if name not in tensors]
        problems += _unknown(path, told, settings)
        if kind is Experts and not any(f"{path}.{name}" in tensors for name in ROUTES):
            problems.append(f"{path} has none of {', '.join(ROUTES)} to route by")
        if told.get("leading") is True and not _leads(path, tensors):
            problems.append(f"{path}: leading is true, and prototypes are not the first rank of a")
    return problems + [f"{name} is not expected" for name in tensors if name not in wanted]


def _leads(path: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a module's prototypes are the first rank of its `a`."""
    a, prototypes = (tensors.get(f"{path}.{name}") for name in ("a", "prototypes"))
    return a is not None and prototypes is not None and np.array_equal(a[..., 0], prototypes)


def _parts(kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kind holds if nothing else is said: arrays, and plain settings, by name."""
    both: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for field in fields(kind):
        both[not field.metadata.get("pytree_node", True)][field.name] = field.default
    return both


def _endless(tensors: Mapping[str, np.ndarray]) -> list[str]:
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    return [f"{name} holds NaN or infinite values" for name in bad]


def _unknown(path: str, told: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings that a record has of a module."""
    needed = [name for name in settings if name not in ADDED]
    problems = [f"{path}: {name} is missing" for name in needed if name not in told]
    problems += [f"{path}: {n} is not expected" for n in told if n not in {"kind", *settings}]
    for name in settings.keys() & told.keys():
        value, kind = told[name], type(settings[name])
        allowed = value in CHOICES[name] if name in CHOICES else type(value) in (int, kind)
        problems += [] if allowed else [f"{path}: {name} cannot be {value!r}"]
    return problems


def _module(path: str, told: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Module:
    """One module, of a record and tensors that are in order."""
    kind = KINDS[told["kind"]]
    arrays, settings = _parts(kind)
    names = {name: f"{path}.{name}" for name in arrays}
    held = {name: jnp.asarray(tensors[key]) for name, key in names.items() if key in tensors}
    plain = {name: type(usual)(told.get(name, usual)) for name, usual in settings.items()}
    return kind(**held, **plain)

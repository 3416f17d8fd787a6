"""Adapters from PEFT's folders: adapter_config.json beside safetensors, or a PyTorch file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_jax import models, torch_file
from lora_jax.checkpoint import open_safetensors, type_problems
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Module, Saved
from lora_jax.peft import audit, build, fused, names, whole
from lora_jax.peft.settings import Settings, read_settings
from lora_jax.peft.targets import by_pattern

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


def load_adapter(folder: Path | str, config: models.Config) -> dict[str, Module]:
    """The adapter in a PEFT folder, in float32, stacked over the layers of the base `config`.

    Every tensor must have a place and every target be whole: what is amiss is told all at once.
    Layers that the adapter leaves alone get zeros, which change nothing. An adapter of fused
    projections comes apart on a base that has them apart, and the other way round.
    """
    folder = Path(folder).expanduser()
    settings = read_settings(folder)
    path, tensors = _read_tensors(folder)
    found = _sorted(tensors, settings, config)
    places = fused.arranged(names.slots(config), found.modules, config)
    ranks = by_pattern(settings.ranks, settings.rank, found.modules, settings.patience)
    told = f"{path} (made for {settings.base})" if settings.base else str(path)
    refuse_all(_problems(settings, found, places.slots, ranks, config), told)
    scales = _scales(settings, found)
    adapter = build.modules(places.slots, found.modules, scales)
    adapter = fused.as_in_base(adapter, places)
    order = dict.fromkeys(slot.path for slot in names.slots(config).values())
    adapter = {path: adapter[path] for path in order if path in adapter}
    return adapter | _saved(settings, found, config)


def _read_tensors(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The file and its tensors in float32; NaN and infinities are refused by name."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLED).exists():
        path = folder / PICKLED
        stored = torch_file.read_tensors(path)
    else:
        if not path.exists():
            raise InputError(f"{folder} holds neither {WEIGHTS} nor {PICKLED}")
        with open_safetensors(path) as file:
            refuse_all(type_problems(file, file.keys()), str(path))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {name: stored[name].astype(np.float32) for name in sorted(stored)}
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    refuse_all([f"{name} holds NaN or infinite values" for name in bad], str(path))
    return path, tensors


@dataclass(frozen=True)
class _Found:
    """A file's tensors by what they are."""

    modules: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by role
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # the base's own, by name
    copies: dict[str, np.ndarray] = field(default_factory=dict)  # of frozen embeddings, by name
    problems: list[str] = field(default_factory=list)


def _sorted(tensors: Mapping[str, np.ndarray], settings: Settings, config: models.Config) -> _Found:
    """The tensors by module and role, or as weights of the base; no two may be the same one."""
    found, known, spare = _Found(), names.weights(config), models.family(config).SPARE
    for tensor, value in tensors.items():
        if ".original_module." in tensor:  # of the base, beside a module that is kept whole
            continue
        module, role = names.parsed(tensor)
        name = f"{module}.{role.removeprefix('base_layer.')}"
        if role.startswith(("lora", "ia3")):
            table, key = found.modules.setdefault(module, {}), role.replace("embedding_", "")
        elif name not in known:
            if not any(re.fullmatch(pattern, name) for pattern in spare):
                found.problems.append(f"{tensor} fits no projection or weight of this base model")
            continue
        else:
            frozen = known[name].path == "unembed.bias" and settings.biases == "none"
            is_copy = role == "base_layer.weight" or (role == "base_layer.bias" and frozen)
            table, key = (found.copies if is_copy else found.weights), name
        if key in table and not np.array_equal(table[key], value):
            found.problems.append(f"{tensor} is stored a second time, and otherwise")
        table[key] = value
    return found


def _problems(
    settings: Settings,
    found: _Found,
    slots: Mapping[str, names.Slot],
    ranks: Mapping[str, float],
    config: models.Config,
) -> list[str]:
    """Everything that keeps a file's tensors from being the adapter that its config describes."""
    problems, known = list(found.problems), names.weights(config)
    if not found.modules:
        problems.append("it holds no module")
    problems += audit.target_problems(settings, slots, found.modules)
    sides = audit.sides(settings, found.modules)
    for module, tensors in found.modules.items():
        if module not in slots:
            problems.append(f"{module} fits no projection of this base model")
        elif amiss := audit.role_problems(settings, module, tensors):
            problems += amiss
        elif settings.kind == "IA3":
            problems += audit.ia3_problems(slots[module], module, tensors["ia3_l"], sides[module])
        else:
            problems += audit.lora_problems(slots[module], module, tensors, ranks[module])
    problems += audit.saved_problems(settings, known, found.weights, found.modules)
    held = {slots[module].path for module in found.modules if module in slots}
    held |= {known[name].path for name in found.weights}
    problems += audit.embedding_problems(config, held)
    return problems + audit.copy_problems(known, found.copies)


def _scales(settings: Settings, found: _Found) -> dict[str, float]:
    """Each LoRA's alpha / rank, or alpha / √rank under rslora."""
    if settings.kind == "IA3":
        return {}
    alphas = by_pattern(settings.alphas, settings.alpha, found.modules, settings.patience)
    ranks = {module: len(tensors["lora_A"]) for module, tensors in found.modules.items()}
    over = math.sqrt if settings.rslora else float
    return {module: alphas[module] / over(rank) for module, rank in ranks.items()}


def _saved(settings: Settings, found: _Found, config: models.Config) -> dict[str, Saved]:
    """The weights stored whole; a tied embedding's is the unembedding's too if the config says."""
    saved = whole.as_here(names.weights(config), found.weights)
    if settings.tied and config.tied and "embed" in saved and "unembed" not in saved:
        saved["unembed"] = Saved(saved["embed"].value.T)
    return saved

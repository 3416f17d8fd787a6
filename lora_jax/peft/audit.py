"""Whether an adapter's tensors are what its config says and what its base has a place for."""

from collections.abc import Iterable, Mapping

import numpy as np

from lora_jax import models
from lora_jax.peft.names import BIAS, MAGNITUDE, Slot, Weight
from lora_jax.peft.patterns import matching
from lora_jax.peft.settings import Settings
from lora_jax.peft.targets import kept_whole, targeted

Tensors = Mapping[str, np.ndarray]  # one module's by role, or base weights by name


def target_problems(
    settings: Settings, slots: Mapping[str, Slot], stored: Iterable[str]
) -> list[str]:
    """Targets without tensors, and tensors of modules that are no targets."""
    found = targeted(settings, {name: slot.linear for name, slot in slots.items()})
    if found is None:
        return []
    stored = set(stored) & slots.keys()
    if settings.tied:
        found |= {name for name in stored if slots[name].path in ("embed", "unembed")}
    where = f"among the targets of {settings.where}"
    lost = [name for name in slots if name in found - stored]
    return [f"{name} is {where} and has no tensor" for name in lost] + [
        f"{name} has tensors and is not {where}" for name in sorted(stored - found)
    ]


def role_problems(settings: Settings, module: str, tensors: Tensors) -> list[str]:
    """Tensors that a module lacks, and those that the config does not ask for."""
    wanted = {"ia3_l"} if settings.kind == "IA3" else {"lora_A", "lora_B"}
    wanted |= {MAGNITUDE} if settings.dora else set()
    wanted |= {BIAS} if settings.lora_bias else set()
    keys = {MAGNITUDE: "use_dora", BIAS: "lora_bias"}
    return [f"{module} lacks {role}" for role in sorted(wanted - tensors.keys())] + [
        f"{module} has {role}, for which {keys.get(role, 'peft_type')} does not ask"
        for role in sorted(tensors.keys() - wanted)
    ]


def lora_problems(slot: Slot, module: str, tensors: Tensors, rank: float) -> list[str]:
    """Factors that do not meet, or are not of the base's sizes and the config's rank."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return [f"{module}: factors {a.shape} and {b.shape} do not meet"]
    problems = []
    if (size := (a.shape[1], b.shape[0])) != slot.size:
        problems.append(f"{module} maps {_to(size)}, the base {_to(slot.size)}{_hint(slot.path)}")
    if a.shape[0] < 1 or a.shape[0] != rank:
        problems.append(f"{module} has rank {a.shape[0]}, the config says {rank}")
    problems += [
        f"{module} has {role} of shape {tensors[role].shape}, not {slot.size[1:]}"
        for role in (MAGNITUDE, BIAS)
        if role in tensors and tensors[role].shape != slot.size[1:]
    ]
    if MAGNITUDE in tensors and not tensors[MAGNITUDE].all():
        problems.append(f"{module} has a {MAGNITUDE} with a 0, which no kernel's column gives")
    return problems


def _to(size: tuple[int, int]) -> str:
    """Sizes in words."""
    return f"{size[0]} to {size[1]}"


def _hint(path: str) -> str:
    """What is likely to be wrong where tokens are counted."""
    resized = "; if the adapter's vocabulary was resized, give the resized model as the base"
    return resized if path in ("embed", "unembed") else ""


def ia3_problems(slot: Slot, module: str, scales: np.ndarray, on_input: bool | None) -> list[str]:
    """Scales that are not of the base's size, or not on the side that the config says."""
    if slot.embedding:
        return [f"{module} is an embedding, which PEFT's IA3 does not rescale"]
    if on_input is None:
        on_input = scales.shape[:1] == (1,)
    wanted = (1, slot.size[0]) if on_input else (slot.size[1], 1)
    if scales.shape == wanted:
        return []
    return [f"{module} has ia3_l of shape {scales.shape}, not {wanted}"]


def sides(settings: Settings, modules: Iterable[str]) -> dict[str, bool | None]:
    """Whether IA3 rescales each module's input, if the config says."""
    modules = list(modules)
    if not settings.inputs:
        return dict.fromkeys(modules)
    if isinstance(settings.inputs, str):
        found = matching(settings.inputs, modules, settings.patience)
        return {name: name in found for name in modules}
    return {name: name.endswith(settings.inputs) for name in modules}


def saved_problems(
    settings: Settings, weights: Mapping[str, Weight], stored: Tensors, targets: Iterable[str]
) -> list[str]:
    """Base weights that are stored and should not be, or the other way round, or do not fit."""
    wanted = {name for name in weights if kept_whole(settings, name.rpartition(".")[0])}
    if settings.biases == "all":
        wanted |= {name for name in weights if name.endswith(".bias")}
    elif settings.biases == "lora_only":
        wanted |= {f"{module}.bias" for module in targets} & weights.keys()
    tokens = {name for name, weight in weights.items() if weight.path in ("embed", "unembed")}
    wanted -= tokens if settings.tied else set()
    problems = [
        f"{name} has no tensor, though modules_to_save or bias asks for one"
        for name in sorted(wanted - stored.keys())
    ]
    problems += [
        f"{name} is stored, though neither modules_to_save nor bias asks for it"
        for name in sorted(stored.keys() - wanted - tokens)
    ]
    return problems + [p for name in stored for p in _misfits(weights, name, stored)]


def _misfits(weights: Mapping[str, Weight], name: str, stored: Tensors) -> list[str]:
    """A stored base weight of another shape, or of some layers only."""
    weight = weights[name]
    shape, wanted = stored[name].shape, weight.leaf.stored_shape()
    if not weight.leaf.fits(shape):
        return [f"{name} has shape {shape}, the base {wanted}{_hint(weight.path)}"]
    lost = [other for other in weight.leaf.names() if other not in stored]
    return [f"{name} is stored, but {lost[0]} is not: all layers or none"] if lost else []


def embedding_problems(config: models.Config, paths: Iterable[str]) -> list[str]:
    """An embedding's module where it would change something here and nothing in PEFT."""
    if models.kind(config) != "encoder-decoder" or "embed" not in paths:
        return []
    (name,) = models.table(config)["embed"].names()
    return [
        f"{name.removesuffix('.weight')}: an encoder-decoder's embedding changes nothing in PEFT, "
        f"where either stack holds an embed_tokens of its own; leave it out of the adapter"
    ]


def copy_problems(weights: Mapping[str, Weight], copies: Tensors) -> list[str]:
    """Copies of the base's frozen weights that cannot be its.

    PEFT adds them to an adapter of the embeddings; they only show that the base is the right one.
    """
    return [
        f"{name} has shape {copy.shape}, the base {weights[name].leaf.stored_shape()}"
        f"{_hint(weights[name].path)}"
        for name, copy in copies.items()
        if copy.shape != weights[name].leaf.stored_shape()
    ]

"""Adapters to PEFT's folders; docs/peft.md has what PEFT may say as it loads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, save_tensors, write_beside, write_json
from lora_jax.modules import IA3, Adapter, DoRA, LoRA, Module, Saved
from lora_jax.peft import audit, names, whole
from lora_jax.peft.names import BIAS, MAGNITUDE
from lora_jax.peft.parts import Part, parts, scaled
from lora_jax.peft.read import WEIGHTS
from lora_jax.peft.settings import CONFIG

TASKS = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}


def save_adapter(
    folder: Path | str,
    adapter: Adapter,
    config: models.Config,
    *,
    base_name: str = "",
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a PEFT folder, whole or not at all.

    `extra` maps names of files to texts, or values for JSON, that are written beside it.
    """
    with new_folder(Path(folder).expanduser(), overwrite) as scratch:
        write_adapter(scratch, adapter, config, base_name=base_name)
        write_beside(scratch, extra or {})


def write_adapter(
    folder: Path, adapter: Adapter, config: models.Config, *, base_name: str = ""
) -> None:
    """Writes an adapter's two files into an existing folder.

    IA3 is stored as 1 + offset in float32, all that a float32 forward pass ever sees of it. Ranks
    and layers of a LoRA that hold only zeros are left out, unless all of the projection's do: they
    came of padding, and an adapter of some layers is one again.
    """
    saved = {path: m for path, m in adapter.items() if isinstance(m, Saved)}
    modules = {path: m for path, m in adapter.items() if path not in saved}
    kind, found = kind_of(adapter), parts(modules, config)
    settings, found = (_ia3_settings if kind is IA3 else _lora_settings)(found, config)
    kept = whole.as_stored(saved, config)
    asked = whole.settings(kept, found, config)
    tensors = {f"{n}.{role}": t for n, part in found.items() for role, t in part.tensors.items()}
    tensors |= {_in_adapter(name, found): value for name, value in kept.items()}
    problems = whole.problems(saved, kept, asked, config) + _problems(tensors, asked, kind)
    problems += audit.embedding_problems(config, adapter)
    if kind is IA3 and "embed" in modules:
        problems.append("embed: PEFT's IA3 takes no embedding")
    refuse_all(problems, "cannot save as PEFT does")
    stored = {names.PREFIX + name: np.ascontiguousarray(t) for name, t in tensors.items()}
    save_tensors(folder / WEIGHTS, stored)
    settings |= asked if kind is not IA3 else {"modules_to_save": asked["modules_to_save"]}
    settings |= {"base_model_name_or_path": base_name, "task_type": _task(saved, config)}
    write_json(folder / CONFIG, settings | {"inference_mode": True, "revision": None})


def kind_of(adapter: Adapter) -> type[Module]:
    """The one kind of module that an adapter is of: PEFT's format holds no mixture."""
    kinds = {type(module) for module in adapter.values()} - {Saved}
    if len(kinds) != 1 or not kinds <= {LoRA, DoRA, IA3}:
        held = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InputError(
            f"PEFT's format holds LoRA, DoRA or IA3 modules; this adapter holds {held}"
        )
    return kinds.pop()


def _problems(tensors: Mapping[str, np.ndarray], asked: Mapping[str, Any], kind: type) -> list[str]:
    """What PEFT's format cannot hold of an adapter's modules."""
    problems = [
        f"{name} holds NaN or infinite values"
        for name, tensor in tensors.items()
        if not np.isfinite(tensor).all()
    ]
    problems += [
        f"{name} has a 0, which stands for the norm of a base's column; merge the adapter instead"
        for name, tensor in tensors.items()
        if name.endswith(MAGNITUDE) and not tensor.all()
    ]
    if kind is IA3 and asked["bias"] != "none":
        problems.append("PEFT keeps no biases of the base with IA3")
    if any(name.endswith(BIAS) for name in tensors) and any("lora_embedding" in n for n in tensors):
        problems.append("PEFT has no lora_bias where an embedding has a LoRA")
    return problems


def _in_adapter(name: str, targets: Mapping[str, Part]) -> str:
    """What PEFT calls a weight of the base's own: a target's is inside the module around it."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}" if module in targets else name


def _task(saved: Mapping[str, Saved], config: models.Config) -> str | None:
    """PEFT's name for what the model does; none for a classifier whose head is the base's.

    PEFT's own classifiers bring their head along.
    """
    kind = models.kind(config)
    bare = kind == "classifier" and not saved.keys() >= set(models.head_paths(config))
    return None if bare else TASKS[kind]


def _lora_settings(
    found: Mapping[str, Part], config: models.Config
) -> tuple[dict[str, Any], Mapping[str, Part]]:
    """adapter_config.json of LoRA or DoRA modules, and the modules whose scales it gives."""
    rslora, alphas, found = scaled(found)
    rank, ranks = names.patterns({name: part.rank for name, part in found.items()})
    alpha, others = names.patterns({name: _plain_number(a) for name, a in alphas.items()})
    first = next(iter(found.values())).tensors
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": others,
        "use_rslora": rslora,
        "use_dora": MAGNITUDE in first,
        "lora_bias": BIAS in first,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": _endings(found, config),
        "fan_in_fan_out": _fan_in_fan_out(found, config),
    }, found


def _ia3_settings(
    found: Mapping[str, Part], config: models.Config
) -> tuple[dict[str, Any], Mapping[str, Part]]:
    """adapter_config.json of IA3 modules; those whose input is rescaled are "feedforward"."""
    inputs = [name for name, part in found.items() if part.tensors["ia3_l"].shape[0] == 1]
    outputs = [name for name in found if name not in inputs]
    feeds = _endings(inputs, config)
    return {
        "peft_type": "IA3",
        "init_ia3_weights": True,
        "target_modules": sorted({*feeds, *_endings(outputs, config)}),
        "feedforward_modules": feeds,
        "fan_in_fan_out": _fan_in_fan_out(found, config),
    }, found


def _endings(modules: Any, config: models.Config) -> list[str]:
    """The shortest endings of the modules' names that no other module of the model has."""
    every = {name.rpartition(".")[0] for name in names.weights(config)}
    return sorted(set(names.shortest(modules, every - set(modules)).values()))


def _fan_in_fan_out(modules: Mapping[str, Part], config: models.Config) -> bool:
    """Whether the base stores the modules' kernels (in, out), as GPT-2 does."""
    known = names.weights(config)
    leaves = [known[f"{name}.weight"].leaf for name in modules]
    return any(leaf.stacked and not leaf.transposed for leaf in leaves)


def _plain_number(value: float) -> float | int:
    """A whole number as an integer."""
    return int(value) if value == int(value) else value

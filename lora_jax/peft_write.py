"""Adapters to PEFT's directory format; `peft` reads it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, save_tensors, write_json
from lora_jax.modules import IA3, Adapter, LoRA
from lora_jax.table import kernels

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


def save_adapter(
    folder: Path,
    adapter: Adapter,
    config: models.Config,
    *,
    base_name: str = "",
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a PEFT folder, whole or not at all.

    `extra` maps names of JSON files to values that are written beside it.
    """
    with new_folder(folder, overwrite) as scratch:
        write_adapter(scratch, adapter, config, base_name=base_name)
        for name, value in (extra or {}).items():
            write_json(scratch / name, value)


def write_adapter(
    folder: Path, adapter: Adapter, config: models.Config, *, base_name: str = ""
) -> None:
    """Writes an adapter's two files into an existing folder.

    IA3 is stored as 1 + offset in float32, all that a float32 forward pass ever sees of it.
    """
    loras = {path: _exact_alpha(m) for path, m in adapter.items() if isinstance(m, LoRA)}
    rescalings = {path: m for path, m in adapter.items() if isinstance(m, IA3)}
    if loras and len(loras) == len(adapter):
        adapter, settings = loras, _lora_settings(loras)
    elif rescalings and len(rescalings) == len(adapter):
        settings = _ia3_settings(rescalings)
    else:
        kinds = {type(module).__name__ for module in adapter.values()}
        names = ", ".join(sorted(kinds)) or "nothing"
        raise InputError(f"PEFT's format holds LoRA or IA3 modules; this adapter holds {names}")
    tensors = dict(_named_tensors(adapter, config))
    bad = [
        f"{name} holds NaN or infinite values"
        for name, t in tensors.items()
        if not np.isfinite(t).all()
    ]
    refuse_all(bad, f"cannot save to {folder}")
    save_tensors(folder / WEIGHTS, tensors)
    common = {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM"}
    write_json(folder / CONFIG, settings | common | {"inference_mode": True, "revision": None})


def _exact_alpha(module: LoRA) -> LoRA:
    """The module with a scale that alpha / rank gives back exactly; folded if there is none."""
    rank = module.a.shape[-1]
    if (module.scale * rank) / rank == module.scale:
        return module
    return LoRA(module.a, module.b * module.scale, 1.0)


def _lora_settings(adapter: Mapping[str, LoRA]) -> dict[str, Any]:
    """adapter_config.json of LoRA modules; patterns name the projections that differ."""
    ranks = {path: module.a.shape[-1] for path, module in adapter.items()}
    alphas = {path: ranks[path] * module.scale for path, module in adapter.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in adapter}),
        "rank_pattern": {p: r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {p: _plain_number(a) for p, a in alphas.items() if a != alpha},
    }


def _plain_number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _ia3_settings(adapter: Mapping[str, IA3]) -> dict[str, Any]:
    last = {path: path.rsplit(".", 1)[-1] for path in adapter}
    return {
        "peft_type": "IA3",
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "target_modules": sorted(last.values()),
        "feedforward_modules": sorted(last[p] for p, m in adapter.items() if m.on == "input"),
    }


def _named_tensors(adapter: Adapter, config: models.Config) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the adapter under its PEFT name, in PEFT's orientation."""
    leaves = kernels(models.table(config))
    for path, module in adapter.items():
        for layer, stored in enumerate(leaves[path].names()):
            name = PREFIX + stored.removesuffix(".weight")
            if isinstance(module, LoRA):
                yield f"{name}.lora_A.weight", _row_major(module.a[layer].T)
                yield f"{name}.lora_B.weight", _row_major(module.b[layer].T)
            elif isinstance(module, IA3):
                column = np.asarray(1 + module.offset[layer])[:, None]
                yield f"{name}.ia3_l", _row_major(column.T if module.on == "input" else column)


def _row_major(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(tensor, np.float32))

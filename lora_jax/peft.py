"""Adapters from and to PEFT's directory format: adapter_config.json and safetensors.

Nothing is ever unpickled. What a config asks for and this library lacks is refused by its key.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_jax import models
from lora_jax.checkpoint import open_safetensors
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, read_json, write_json
from lora_jax.modules import IA3, Adapter, LoRA, Module

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."

# Keys that change what the tensors mean. Any value but the ones listed is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None, []),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "arrow_config": (None,),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "megatron_config": (None,),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    # The other ways to start (pissa, olora, corda, loftq, lora_ga, mica) change the base too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def load_adapter(folder: Path, config: models.Config) -> dict[str, Module]:
    """The adapter in a PEFT folder, in float32, stacked over the layers of the base `config`.

    Every tensor must have a place and every target be whole: what is amiss is told all at once.
    """
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise InputError(f"{folder / CONFIG}: peft_type {kind!r} is not supported (LORA, IA3 are)")
    refuse_all(
        [
            f"{key} = {settings[key]!r} is not supported"
            for key, plain in _PLAIN.items()
            if key in settings and settings[key] not in plain
        ],
        str(folder / CONFIG),
    )
    tensors = _read_tensors(folder)
    found = _sort(tensors, config, folder)
    refuse_all(_unfilled(settings, found), str(folder / WEIGHTS))
    build = _lora if kind == "LORA" else _ia3
    return build(found, settings, config, folder)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the adapter in float32; NaN and infinities are refused by name."""
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run code; "
            f"save the adapter again with PEFT's safe_serialization=True"
        )
    with open_safetensors(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in sorted(file.keys())}
    bad = [f"{n} holds NaN or infinite values" for n, t in tensors.items() if not _finite(t)]
    refuse_all(bad, str(folder / WEIGHTS))
    return tensors


def _finite(tensor: np.ndarray) -> bool:
    return bool(np.isfinite(tensor).all())


@dataclass(frozen=True)
class _Part:
    """One stored tensor: which layer, projection and role it has."""

    layer: int
    path: str
    role: str  # "lora_A", "lora_B" or "ia3_l"
    value: np.ndarray


def _sort(tensors: Mapping[str, np.ndarray], config: models.Config, folder: Path) -> list[_Part]:
    """The tensors by layer, projection and role; names that fit no projection are refused."""
    stems = _stems(config)
    pattern = re.compile(r"^(.*?)\.(lora_A|lora_B|ia3_l)(?:\.default)?(?:\.weight)?$")
    parts, problems = [], []
    for name, value in tensors.items():
        match = pattern.match(name.removeprefix(_PREFIX))
        if match is None or match[1] not in stems:
            problems.append(f"{name} fits no projection of this base model")
            continue
        layer, path = stems[match[1]]
        parts.append(_Part(layer, path, match[2], value))
    refuse_all(problems, str(folder / WEIGHTS))
    if not parts:
        raise InputError(f"{folder / WEIGHTS} holds no module")
    return parts


def _unfilled(settings: Mapping[str, Any], parts: list[_Part]) -> list[str]:
    """The targets that the config names and no tensor fills."""
    targets = settings.get("target_modules") or []
    if isinstance(targets, str) or settings.get("exclude_modules"):
        return []  # a pattern, or one with exceptions: what was stored is what was trained
    names = {_full_name(part.path, part.layer) for part in parts}
    lost = [t for t in targets if not any(_is_named(t, name) for name in names)]
    return [f"target {t!r} has no tensor" for t in lost]


def _full_name(path: str, layer: int) -> str:
    return f"model.layers.{layer}.{path}"


def _is_named(key: str, name: str) -> bool:
    """Whether PEFT's suffix rule lets `key` name the module called `name`."""
    return f".{name}".endswith(f".{key}")


def _stems(config: models.Config) -> dict[str, tuple[int, str]]:
    """The checkpoint's name of every projection, without ".weight", to its layer and path."""
    table = models.table(config)
    return {
        name.removesuffix(".weight"): (layer, path)
        for path in models.projections(config)
        for layer, name in enumerate(table[f"layers.{path}"].names())
    }


def _by_path(parts: list[_Part], role: str, config: models.Config, folder: Path):
    """For each projection, the tensors of one role in layer order; every layer must have one."""
    table: dict[str, dict[int, np.ndarray]] = {}
    for part in parts:
        if part.role == role:
            table.setdefault(part.path, {})[part.layer] = part.value
    problems = [
        f"{path} has {role} on {len(layers)} of {config.layers} layers"
        for path, layers in table.items()
        if len(layers) != config.layers
    ]
    refuse_all(problems, str(folder / WEIGHTS))
    return {path: [layers[n] for n in range(config.layers)] for path, layers in table.items()}


def _lora(parts: list[_Part], settings: Mapping[str, Any], config, folder) -> dict[str, Module]:
    """LoRA modules: ragged ranks padded with zeros, unequal scales of a stack folded into b."""
    a, b = (_by_path(parts, role, config, folder) for role in ("lora_A", "lora_B"))
    problems = [f"{path} lacks one of its factors" for path in a.keys() ^ b.keys()]
    sizes = models.projections(config)
    rank_of = _setting(settings, "r", "rank_pattern", folder)
    for path in a.keys() & b.keys():
        ranks = [rank_of(path, layer) for layer in range(config.layers)]
        problems += _shape_problems(path, a[path], b[path], sizes[path], ranks)
    refuse_all(problems, str(folder / WEIGHTS))
    scale_of = _scales(settings, folder)
    return {path: _one_lora(path, a[path], b[path], scale_of) for path in sizes if path in a}


def _shape_problems(
    path: str, a: list, b: list, size: tuple[int, int], ranks: list[float]
) -> list[str]:
    problems = []
    for n, (x, y, rank) in enumerate(zip(a, b, ranks, strict=True)):
        if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[1]:
            problems.append(f"layer {n} {path}: factors {x.shape} and {y.shape} do not meet")
        elif (x.shape[1], y.shape[0]) != size:
            got = (x.shape[1], y.shape[0])
            problems.append(f"layer {n} {path} maps {got[0]} to {got[1]}, the base {size}")
        elif x.shape[0] < 1:
            problems.append(f"layer {n} {path} has rank 0")
        elif x.shape[0] != rank:
            problems.append(f"layer {n} {path} has rank {x.shape[0]}, the config says {rank}")
    return problems


def _one_lora(path: str, a: list[np.ndarray], b: list[np.ndarray], scale_of) -> LoRA:
    ranks = [x.shape[0] for x in a]
    scales = [scale_of(path, n, rank) for n, rank in enumerate(ranks)]
    top = max(ranks)
    a_stack = np.stack([np.pad(x.T, ((0, 0), (0, top - len(x)))) for x in a])
    b_stack = np.stack([np.pad(y.T, ((0, top - y.shape[1]), (0, 0))) for y in b])
    if len(set(scales)) == 1:
        return LoRA(jnp.asarray(a_stack), jnp.asarray(b_stack), scales[0])
    b_stack = b_stack * np.asarray(scales, np.float32)[:, None, None]
    return LoRA(jnp.asarray(a_stack), jnp.asarray(b_stack), 1.0)


def _scales(settings: Mapping[str, Any], folder: Path):
    """A function from (path, layer, rank) to alpha / rank, as the config and its patterns say."""
    alpha_of = _setting(settings, "lora_alpha", "alpha_pattern", folder)
    rslora = bool(settings.get("use_rslora"))

    def scale(path: str, layer: int, rank: int) -> float:
        alpha = alpha_of(path, layer)
        return alpha / math.sqrt(rank) if rslora else alpha / rank

    return scale


def _setting(settings: Mapping[str, Any], key: str, pattern_key: str, folder: Path):
    """A function from (path, layer) to a number of the config: the first pattern's or `key`'s."""
    patterns = settings.get(pattern_key) or {}
    odd = [name for name in patterns if not re.fullmatch(r"[\w.]+", name)]
    if odd:
        raise InputError(f"{folder / CONFIG}: {pattern_key} key {odd[0]!r} is not a plain name")
    default = settings.get(key)
    numbers = {key: default, **patterns}
    bad = [f"{name} is {n!r}, not a number" for name, n in numbers.items() if not _is_number(n)]
    refuse_all(bad, str(folder / CONFIG))

    def value(path: str, layer: int) -> float:
        name = _full_name(path, layer)
        return next((v for k, v in patterns.items() if _is_named(k, name)), default)

    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ia3(parts: list[_Part], settings: Mapping[str, Any], config, folder) -> dict[str, Module]:
    """IA3 modules: a stored scale l becomes the offset l - 1.

    PEFT stores it as a row where it rescales the input, as a column where the output.
    """
    stored = _by_path(parts, "ia3_l", config, folder)
    sizes, adapter, problems = models.projections(config), {}, []
    for path, values in stored.items():
        on = "input" if values[0].shape[0] == 1 else "output"
        shape = (1, sizes[path][0]) if on == "input" else (sizes[path][1], 1)
        if any(v.shape != shape for v in values):
            problems.append(f"{path} has ia3_l of shape {values[0].shape}, the base asks {shape}")
            continue
        adapter[path] = IA3(jnp.asarray(np.stack([v.reshape(-1) for v in values]) - 1), on)
    refuse_all(problems, str(folder / WEIGHTS))
    return {path: adapter[path] for path in sizes if path in adapter}


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
    kinds = {type(module) for module in adapter.values()}
    if kinds == {LoRA}:
        adapter = {path: _exact_alpha(module) for path, module in adapter.items()}
        settings = _lora_settings(adapter)
    elif kinds == {IA3}:
        settings = _ia3_settings(adapter)
    else:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InputError(f"PEFT's format holds LoRA or IA3 modules; this adapter holds {names}")
    tensors = dict(_named_tensors(adapter, config))
    bad = [f"{name} holds NaN or infinite values" for name, t in tensors.items() if not _finite(t)]
    refuse_all(bad, f"cannot save to {folder}")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
    table = models.table(config)
    for path, module in adapter.items():
        for layer, stored in enumerate(table[f"layers.{path}"].names()):
            name = _PREFIX + stored.removesuffix(".weight")
            if isinstance(module, LoRA):
                yield f"{name}.lora_A.weight", _row_major(module.a[layer].T)
                yield f"{name}.lora_B.weight", _row_major(module.b[layer].T)
            else:
                column = np.asarray(1 + module.offset[layer])[:, None]
                yield f"{name}.ia3_l", _row_major(column.T if module.on == "input" else column)


def _row_major(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(tensor, np.float32))

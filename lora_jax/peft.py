"""Adapters from PEFT's directory format: adapter_config.json and safetensors.

Nothing is ever unpickled. What a config asks for and this library lacks is refused by its key.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.checkpoint import open_safetensors
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import read_json
from lora_jax.modules import IA3, LoRA, Module
from lora_jax.peft_write import CONFIG, PREFIX, WEIGHTS, save_adapter, write_adapter
from lora_jax.table import kernels

__all__ = ["CONFIG", "WEIGHTS", "load_adapter", "save_adapter", "write_adapter"]

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
        match = pattern.match(name.removeprefix(PREFIX))
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
    return {
        name.removesuffix(".weight"): (layer, path)
        for path, leaf in kernels(models.table(config)).items()
        for layer, name in enumerate(leaf.names())
    }


def _by_path(parts: list[_Part], role: str, config: models.Config, folder: Path):
    """For each projection, the tensors of one role in layer order; every layer must have one."""
    table: dict[str, dict[int, np.ndarray]] = {}
    for part in parts:
        if part.role == role:
            table.setdefault(part.path, {})[part.layer] = part.value
    shapes = models.projections(config)
    problems = [
        f"{path} has {role} on {len(layers)} of {shapes[path][0]} layers"
        for path, layers in table.items()
        if len(layers) != shapes[path][0]
    ]
    refuse_all(problems, str(folder / WEIGHTS))
    return {path: [layers[n] for n in sorted(layers)] for path, layers in table.items()}


def _lora(parts: list[_Part], settings: Mapping[str, Any], config, folder) -> dict[str, Module]:
    """LoRA modules: ragged ranks padded with zeros, unequal scales of a stack folded into b."""
    a, b = (_by_path(parts, role, config, folder) for role in ("lora_A", "lora_B"))
    problems = [f"{path} lacks one of its factors" for path in a.keys() ^ b.keys()]
    sizes = models.projections(config)
    rank_of = _setting(settings, "r", "rank_pattern", folder)
    for path in a.keys() & b.keys():
        layers, *size = sizes[path]
        ranks = [rank_of(path, layer) for layer in range(layers)]
        problems += _shape_problems(path, a[path], b[path], (size[0], size[1]), ranks)
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
    default: Any = settings.get(key)
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
        _, fan_in, fan_out = sizes[path]
        shape = (1, fan_in) if on == "input" else (fan_out, 1)
        if any(v.shape != shape for v in values):
            problems.append(f"{path} has ia3_l of shape {values[0].shape}, the base asks {shape}")
            continue
        adapter[path] = IA3(jnp.asarray(np.stack([v.reshape(-1) for v in values]) - 1), on)
    refuse_all(problems, str(folder / WEIGHTS))
    return {path: adapter[path] for path in sizes if path in adapter}

"""What an `adapter_config.json` asks for; what cannot be honoured is refused by its key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError, refuse_all
from lora_jax.fields import is_number, shown
from lora_jax.files import read_json
from lora_jax.peft.patterns import Patience

CONFIG = "adapter_config.json"
MOST = 10_000  # names in a list, or patterns in a table

# Keys that change what the tensors mean: any value but these is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "enable_lora": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}, []),
    "use_bdlora": (False, None),
    "velora_config": (None,),
    "bias": ("none", "all", "lora_only", None),
    # pissa, olora, corda, loftq and lora_ga took their start out of the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
# Keys that are read, and keys that have no bearing on what a trained adapter computes.
_READ = """peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias bias
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern
    feedforward_modules ensure_weight_tying"""
_IGNORED = """auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out
    inference_mode init_ia3_weights init_lora_weights lora_dropout lora_ga_config loftq_config
    megatron_core merge_weights peft_version qalora_group_size revision runtime_config task_type
    unsloth_fixed unsloth_version"""
_KNOWN = {*_PLAIN, *_READ.split(), *_IGNORED.split()}
_REMEDY = {
    "init_lora_weights": "it is for a base that was changed first; save it again with PEFT's "
    "path_initial_model_for_weight_conversion",
}


@dataclass(frozen=True)
class Settings:
    """An adapter's config, as far as it says what its tensors mean."""

    kind: str  # "LORA" or "IA3"
    base: str  # the base model's name or path, "" if it is not said
    where: str  # the file, for messages
    rank: float
    alpha: float
    ranks: Mapping[str, float]  # by pattern
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    lora_bias: bool
    biases: str  # which of the base's are stored: "none", "all" or "lora_only"
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    saved: tuple[str, ...]
    layers: tuple[int, ...]  # none: all
    layer_names: tuple[str, ...]  # what comes before a layer's number; none: anything
    inputs: tuple[str, ...] | str | None  # modules whose input IA3 rescales
    tied: bool  # the embedding's module is the unembedding's too
    patience: Patience = field(default_factory=Patience, compare=False)  # with the file's patterns


def read_settings(folder: Path) -> Settings:
    """The settings in an adapter's folder, checked; what is amiss is told all at once."""
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise InputError(f"{path}: peft_type {kind!r} is not supported (LORA, IA3 are)")
    refuse_all([*_refused(raw), *_malformed(raw)], str(path))
    layers = raw.get("layers_to_transform")
    return Settings(
        kind=kind,
        base=str(raw.get("base_model_name_or_path") or ""),
        where=str(path),
        rank=raw.get("r", 0),
        alpha=raw.get("lora_alpha", 0),
        ranks=raw.get("rank_pattern") or {},
        alphas=raw.get("alpha_pattern") or {},
        rslora=raw.get("use_rslora") or False,
        dora=raw.get("use_dora") or False,
        lora_bias=raw.get("lora_bias") or False,
        biases=raw.get("bias") or "none",
        targets=_names(raw.get("target_modules")) or None,
        excluded=_names(raw.get("exclude_modules")),
        saved=tuple(_names(raw.get("modules_to_save"))),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layer_names=_listed(raw.get("layers_pattern")),
        inputs=None if kind == "LORA" else _names(raw.get("feedforward_modules")),
        tied=raw.get("ensure_weight_tying") or False,
        patience=Patience(where=str(path)),
    )


def _refused(raw: Mapping[str, Any]) -> list[str]:
    """Keys that ask for what is not here, or that nobody here knows."""
    asked = [key for key, plain in _PLAIN.items() if key in raw and raw[key] not in plain]
    problems = [f"{key} = {raw[key]!r} is not supported" for key in asked if key not in _REMEDY]
    problems += [f"{k} = {raw[k]!r} is not supported: {_REMEDY[k]}" for k in asked if k in _REMEDY]
    return problems + [
        f"{key} = {value!r} is not known here; if it does not change what the tensors mean, "
        f"take it out of the file"
        for key, value in raw.items()
        if key not in _KNOWN and value not in (None, False, "", [], {})
    ]


def _malformed(raw: Mapping[str, Any]) -> list[str]:
    """Values that are not of their key's type, and pairs that exclude each other."""
    listed = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
    problems = [
        f"{key} = {raw[key]!r} is neither a list of names nor a pattern"
        for key in listed
        if not isinstance(raw.get(key) or "", str) and not _is_list(raw[key], str)
    ]
    problems += [
        f"{key} = {shown(raw[key])} is neither true nor false"
        for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
        if not isinstance(raw.get(key), bool | None)
    ]
    problems += [
        f"{key} has {len(value)} entries; at most {MOST} are read"
        for key, value in raw.items()
        if key in _KNOWN and isinstance(value, list | dict) and len(value) > MOST
    ]
    if not _is_list(raw.get("modules_to_save") or [], str):
        problems.append(f"modules_to_save = {raw['modules_to_save']!r} is not a list of names")
    layers = raw.get("layers_to_transform")
    if not isinstance(layers, int | None) and not _is_list(layers, int):
        problems.append(f"layers_to_transform = {layers!r} is not a list of numbers")
    if layers not in (None, []) and isinstance(raw.get("target_modules"), str):
        problems.append("layers_to_transform needs target_modules to be a list of names")
    return problems + (_bad_numbers(raw) if raw["peft_type"] == "LORA" else [])


def _bad_numbers(raw: Mapping[str, Any]) -> list[str]:
    """Ranks and alphas that are not numbers."""
    patterns = [(key, raw.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")]
    wrong = [key for key, table in patterns if not isinstance(table, dict)]
    if wrong:
        return [f"{key} = {raw[key]!r} is not a table of numbers by pattern" for key in wrong]
    numbers = {key: raw.get(key) for key in ("r", "lora_alpha")}
    numbers |= {name: n for _, table in patterns for name, n in table.items()}
    return [f"{name} is {n!r}, not a number" for name, n in numbers.items() if not is_number(n)]


def _is_list(value: Any, kind: type) -> bool:
    """Whether a value is a list of one kind."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _names(value: Any) -> tuple[str, ...] | str:
    """Names, or a pattern of names."""
    return value if isinstance(value, str) else tuple(value or ())


def _listed(value: Any) -> tuple[str, ...]:
    """Names, of which there may be just one."""
    return (value,) if isinstance(value, str) and value else tuple(value or ())

"""A base model with an adapter merged into it, as a folder that transformers loads."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import bases, checkpoint, models
from lora_jax.errors import InputError
from lora_jax.files import new_folder, read_json, write_beside, write_json
from lora_jax.merge import merge
from lora_jax.modules import Adapter

DTYPES = ("float32", "bfloat16", "float16")
# What goes with the weights: the tokenizer and the settings of generation.
BESIDE = ("*token*.json", "*token*.txt", "generation_config.json", "*.model", "*.jinja")
BESIDE += ("vocab.json", "vocab.txt", "merges.txt", "preprocessor_config.json")


def save_merged(
    folder: Path,
    base: str,
    adapter: Adapter,
    *,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the base model called `base` with an adapter merged into it, tokenizer and all.

    It is merged in float32 and written in the base's own type. `extra` maps names of files to
    texts, or values for JSON, that are written beside it.
    """
    source = bases.load_base(base, dtype=jnp.float32)
    raw = read_json(source.folder / "config.json")
    weights, config = merge(source.weights, adapter), _untied(source.config, adapter)
    config = _relabelled(config, weights)
    dtype = _dtype(raw, source.folder)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    untied = {} if config.tied == source.config.tied else {"tie_word_embeddings": False}
    if models.kind(config) == "classifier":
        head = models.config_to_huggingface(config)
        raw |= {key: head[key] for key in ("architectures", "id2label", "label2id")}
        raw.pop("num_labels", None)
    raw = {key: value for key, value in raw.items() if key != "auto_map"}  # code is not copied
    with new_folder(folder, overwrite) as scratch:
        checkpoint.write_model(scratch, config, weights)
        write_json(scratch / "config.json", raw | untied)
        for path in {path for pattern in BESIDE for path in source.folder.glob(pattern)}:
            shutil.copyfile(path, scratch / path.name)
        write_beside(scratch, extra or {})


def _dtype(raw: Mapping[str, Any], folder: Path) -> Any:
    """The type in which a base is stored, as its config says."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise InputError(
            f"{folder / 'config.json'}: dtype {name!r} is none of {', '.join(DTYPES)}; say which "
            f"the merged model shall have"
        )
    return jnp.dtype(plain)


def _relabelled(config: Any, weights: Mapping[str, Any]) -> Any:
    """The config of the merged model: a classifier's head may be an adapter's, with its labels."""
    if models.kind(config) != "classifier":
        return config
    count = weights[models.head_paths(config)[-1]].shape[-1]
    if count == len(models.label_names(config)):
        return config
    return models.with_labels(config, models.family(config).generic_labels(count))


def _untied(config: Any, adapter: Adapter) -> Any:
    """The config of the merged model: an adapter of either embedding parts the two."""
    if not config.tied or not {"embed", "unembed"} & adapter.keys():
        return config
    if models.kind(config) == "encoder-decoder":
        raise InputError(
            "this base scales what its one embedding unembeds, which no untied model does; "
            "merge without the adapter's embedding or lm_head"
        )
    return replace(config, tied=False)

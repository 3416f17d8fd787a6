"""Base models from and to Hugging Face folders: config.json and (sharded) safetensors."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from lora_jax import models
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import new_folder, read_json, save_tensors, write_json
from lora_jax.table import Leaf, Table, flatten, nest, shardings

# Stored by some exporters, computed by us.
_IGNORED = ("rotary_emb.inv_freq",)


def read_config(folder: Path) -> models.Config:
    """The model config of a Hugging Face folder."""
    path = folder / "config.json"
    return models.config_from_huggingface(read_json(path), str(path))


def load_weights(
    folder: Path, config: models.Config, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The weights of a Hugging Face folder, stacked over layers, on the mesh if there is one.

    Every stored tensor must be wanted and every wanted one stored, once and in its shape; what is
    amiss is told all at once.
    """
    table = models.table(config)
    placed = flatten(shardings(table, mesh)) if mesh is not None else {}
    with ExitStack() as stack:
        stored = _open(folder, stack)
        _audit(stored, table, folder, config.tied)
        flat = {
            path: _place(_stack(stored, leaf, folder), dtype, placed.get(path))
            for path, leaf in table.items()
        }
    return nest(flat)


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor name of the folder's safetensors files, with the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict):
            raise InputError(f"{index} has no weight_map")
        paths = sorted({folder / Path(str(file)).name for file in files.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder} holds no safetensors file")
    stored: dict[str, Any] = {}
    for path in paths:
        file = stack.enter_context(open_safetensors(path))
        twice = stored.keys() & set(file.keys())
        if twice:
            raise InputError(f"{path} stores {min(twice)} a second time")
        stored |= dict.fromkeys(file.keys(), file)
    return stored


def open_safetensors(path: Path):
    """An open safetensors file, or one clear error if it is missing, truncated or not one."""
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the folder is incomplete") from None
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error})") from None


def _audit(stored: Mapping[str, Any], table: Table, folder: Path, tied: bool) -> None:
    """Refuses a folder whose tensors are not exactly the table's."""
    wanted = {name: leaf for leaf in table.values() for name in leaf.names()}
    spare = {n for n in stored if n.endswith(_IGNORED) or (tied and n == "lm_head.weight")}
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in {*wanted, *spare}]
    for name in wanted.keys() & stored.keys():
        shape = tuple(stored[name].get_slice(name).get_shape())
        if shape != wanted[name].stored_shape():
            problems.append(f"{name} has shape {shape}, not {wanted[name].stored_shape()}")
    refuse_all(problems, str(folder))


def _stack(stored: Mapping[str, Any], leaf: Leaf, folder: Path) -> np.ndarray:
    """One weight as we hold it: transposed if need be, its layers stacked; NaN is refused."""
    tensors = [stored[name].get_tensor(name) for name in leaf.names()]
    whole = [np.isfinite(t).all() for t in tensors]
    bad = [name for name, fine in zip(leaf.names(), whole, strict=True) if not fine]
    refuse_all([f"{name} holds NaN or infinite values" for name in bad], str(folder))
    if leaf.transposed:
        tensors = [t.T for t in tensors]
    return np.stack(tensors) if leaf.stacked else tensors[0]


def _place(tensor: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
    return jax.device_put(np.asarray(tensor, dtype), sharding)


def save_model(
    folder: Path, config: models.Config, weights: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a model as a Hugging Face folder that transformers loads (without a tokenizer)."""
    with new_folder(folder, overwrite) as scratch:
        write_model(scratch, config, weights)


def write_model(folder: Path, config: models.Config, weights: Mapping[str, Any]) -> None:
    """Writes config.json and model.safetensors into an existing folder."""
    flat, tensors = flatten(weights), {}
    for path, leaf in models.table(config).items():
        value = np.asarray(flat[path])
        layers = value if leaf.stacked else [value]
        for name, tensor in zip(leaf.names(), layers, strict=True):
            tensors[name] = np.ascontiguousarray(tensor.T if leaf.transposed else tensor)
    write_json(folder / "config.json", models.config_to_huggingface(config))
    save_tensors(folder / "model.safetensors", tensors)

"""Base models from and to Hugging Face folders: config.json and (sharded) safetensors."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
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
from lora_jax.quantize import Quantized, place, quantized, refuse_quantized
from lora_jax.table import Leaf, Table, flatten, is_projection, nest, new_weight, shardings

FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names of what weights may be stored in
COPIES = r"((encoder|decoder)\.embed_tokens|lm_head)\.weight"  # names of a tied embedding's copies


def read_config(folder: Path) -> models.Config:
    """The model config of a Hugging Face folder."""
    path = folder / "config.json"
    return models.config_from_huggingface(read_json(path), str(path))


def load_weights(
    folder: Path,
    config: models.Config,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    quantization: str = "none",
) -> dict[str, Any]:
    """The weights of a Hugging Face folder, stacked over layers, on the mesh if there is one.

    With a `quantization` ("int8" or "nf4") the layers' projections are held in few bits.

    Every stored tensor must be wanted and every wanted one stored, once and in its shape; what is
    amiss is told all at once. Only a classifier's head may be lacking, and is then a new one.
    """
    table = models.table(config)
    placed = flatten(shardings(table, mesh)) if mesh is not None else {}
    with ExitStack() as stack:
        family = models.family(config)
        stored = _prefixed(_open(folder, stack), table, family.PREFIX)
        stored |= _substitutes(stored, table)
        new = _lacking_head(stored, table)
        there = {path: leaf for path, leaf in table.items() if path not in new}
        _audit(stored, there, folder, family.SPARE)
        _refuse_another_head(stored, there, folder)
        few = {path for path, leaf in there.items() if is_projection(leaf)}
        flat = {
            path: _quantized(_layers(stored, leaf, folder), quantization, placed.get(path))
            if quantization != "none" and path in few
            else _place(_stack(stored, leaf, folder), dtype, placed.get(path))
            for path, leaf in there.items()
        }
    for path, leaf in new.items():
        flat[path] = _place(new_weight(path, leaf), dtype, placed.get(path))
    return nest(flat)


def _substitutes(stored: Mapping[str, "_Stored"], table: Table) -> dict[str, "_Stored"]:
    """What stands in a checkpoint for weights that it does not store apart, by their names."""
    lacking = [leaf for leaf in table.values() if leaf.instead and leaf.name not in stored]
    return {leaf.name: stored[leaf.instead] for leaf in lacking if leaf.instead in stored}


def _lacking_head(stored: Mapping[str, Any], table: Table) -> Table:
    """The weights of a head of which nothing is stored."""
    head = {path: leaf for path, leaf in table.items() if leaf.new is not None}
    names = {name for leaf in head.values() for name in leaf.names()}
    return {} if names & stored.keys() else head


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
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); fetch it again"
        ) from None


def type_problems(file: Any, names: Iterable[str]) -> list[str]:
    """Tensors of an open safetensors file that are not of plain floating-point numbers."""
    kinds = {name: file.get_slice(name).get_dtype() for name in names}
    return [
        f"{name} is {kind}, not one of {', '.join(FLOATS)}: give weights that were not quantized"
        for name, kind in kinds.items()
        if kind not in FLOATS
    ]


def _prefixed(stored: Mapping[str, Any], table: Table, prefix: str) -> dict[str, "_Stored"]:
    """What is stored by the table's names: some exporters leave the model's `prefix` out."""
    wanted = {name for leaf in table.values() for name in leaf.names()}
    bare = not any(name.startswith(prefix) for name in stored)
    return {
        prefix + name if bare and prefix + name in wanted else name: _Stored(file, name)
        for name, file in stored.items()
    }


@dataclass(frozen=True)
class _Stored:
    """A tensor in an open safetensors file."""

    file: Any
    name: str

    def type_problems(self) -> list[str]:
        return type_problems(self.file, [self.name])

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def value(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def _audit(
    stored: Mapping[str, _Stored], table: Table, folder: Path, patterns: tuple[str, ...]
) -> None:
    """Refuses a folder whose tensors are not exactly the table's, but for names that may be spare.

    `patterns` say which: buffers that are computed here, and copies of tied weights.
    """
    wanted = {name: leaf for leaf in table.values() for name in leaf.names()}
    spare = {n for n in stored if any(re.fullmatch(pattern, n) for pattern in patterns)}
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in {*wanted, *spare}]
    for name in wanted.keys() & stored.keys():
        problems += stored[name].type_problems()
        shape = stored[name].shape()
        if shape != wanted[name].stored_shape():
            problems.append(f"{name} has shape {shape}, not {wanted[name].stored_shape()}")
    refuse_all(problems, str(folder))


def _refuse_another_head(stored: Mapping[str, _Stored], table: Table, folder: Path) -> None:
    """Refuses a tied model beside whose embedding another unembedding is stored."""
    (name,) = table["embed"].names()
    unwanted = stored.keys() - {n for leaf in table.values() for n in leaf.names()}
    for copy in sorted(n for n in unwanted if re.fullmatch(COPIES, n)):
        if not np.array_equal(stored[copy].value(), stored[name].value()):
            raise InputError(
                f"{folder}: {copy} is not equal to {name}, though config.json has them tied; "
                f"remove {copy}, or say tie_word_embeddings: false if the model was trained so"
            )


def _layers(stored: Mapping[str, _Stored], leaf: Leaf, folder: Path) -> Iterator[np.ndarray]:
    """One weight as we hold it, layer by layer: transposed if need be; NaN is refused."""
    for name in leaf.names():
        tensor = stored[name].value()
        if not np.isfinite(tensor).all():
            raise InputError(f"{folder}: {name} holds NaN or infinite values")
        yield tensor.T if leaf.transposed else tensor


def _stack(stored: Mapping[str, _Stored], leaf: Leaf, folder: Path) -> np.ndarray:
    """One weight with its layers stacked, if layers have it."""
    tensors = list(_layers(stored, leaf, folder))
    return np.stack(tensors) if leaf.stacked else tensors[0]


def _quantized(layers: Iterator[np.ndarray], kind: str, sharding: Any) -> Quantized:
    """A stacked kernel in few bits; only one layer of it is ever held in full."""
    few = [quantized(layer, kind) for layer in layers]
    return place(jax.tree.map(lambda *parts: jnp.stack(parts), *few), sharding)


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
    refuse_quantized(weights, f"{folder} cannot be written")
    flat, tensors = flatten(weights), {}
    for path, leaf in models.table(config).items():
        value = np.asarray(flat[path])
        layers = value if leaf.stacked else [value]
        for name, tensor in zip(leaf.names(), layers, strict=True):
            tensors[name] = np.ascontiguousarray(tensor.T if leaf.transposed else tensor)
    write_json(folder / "config.json", models.config_to_huggingface(config))
    save_tensors(folder / "model.safetensors", tensors)

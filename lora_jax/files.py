"""Files in and out: whole or not at all, hashed, and never outside the folder asked for."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_jax.errors import InputError

# What decides how a folder's weights are read, and what shows that a folder is one of our results.
CONFIGS = ("config.json", "adapter_config.json", "library.json", "modules.json")
MARKS = (*CONFIGS, "training.json", "results.json", "similarity.json", "diagnosis.json")


def cache_folder() -> Path:
    """Where fetched models and compiled programs are kept: $LORA_JAX_CACHE or ~/.cache/lora_jax."""
    return Path(os.environ.get("LORA_JAX_CACHE") or Path.home() / ".cache" / "lora_jax")


def refuse_existing(folder: Path, overwrite: bool, remedy: str = "choose another --out") -> None:
    """Refuses an output folder that already holds something, unless it may be overwritten.

    Only a folder that carries a mark of ours is overwritten; never a file, nor the working
    directory or one above it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} holds the working directory; {remedy}")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists; {remedy} or pass --overwrite")
    if folder.exists() and not any((folder / mark).exists() for mark in MARKS):
        raise InputError(f"{folder} holds none of {', '.join(MARKS)}: it is not ours to overwrite")


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends well, and vanishes otherwise."""
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists():
            _replace(folder, scratch)
        else:
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    """Puts a new folder in an old one's place, or, whatever happens, leaves the old one there."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = aside / folder.name
    try:
        os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes NumPy arrays as a safetensors file; a full disk is told as one error."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"could not write {path}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole: readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole; NaN has no place in JSON and is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_beside(folder: Path, extra: Mapping[str, Any]) -> None:
    """Writes each value into a folder under its name: a text as it is, all else as JSON."""
    for name, value in extra.items():
        (write_text if isinstance(value, str) else write_json)(folder / name, value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; says where it breaks if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise InputError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return dict(value)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """One sha256 over what a model, adapter or library folder is: its weights and their configs.

    Files count by their path in the folder and their content; records and checkpoints do not, nor
    does what lies in the folders of any but a library.
    """
    whole = hashlib.sha256()
    levels = ("*", "*/*") if (folder / "library.json").exists() else ("*",)
    for path in sorted(path for level in levels for path in folder.glob(level)):
        inside = path.relative_to(folder)
        if path.name in (*CONFIGS, "adapter_model.bin") or path.suffix == ".safetensors":
            whole.update(f"{inside.as_posix()} {sha256(path)}\n".encode())
    return whole.hexdigest()

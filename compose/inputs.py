"""What a user points at: a PEFT adapter folder, or a folder that is a library of them."""

from pathlib import Path

from compose.folder import INDEX, load_library
from compose.library import Library
from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.modules import Adapter


def load_input(path: Path, config: models.Config) -> Adapter | Library:
    """The adapter or library in a folder.

    A library that was saved with Arrow's settings has them as `routing`; `arrow.applied` makes it
    the routed adapter.
    """
    return load_library(path, config) if _is_library(path) else peft.load_adapter(path, config)


def base_name(path: Path) -> str:
    """The base model that the adapter or library in a folder says it belongs to, or ""."""
    index = read_json(path / (INDEX if _is_library(path) else peft.CONFIG))
    return str(index.get("base_model_name_or_path") or "")


def _is_library(path: Path) -> bool:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give an adapter's or a library's")
    if not (path / INDEX).exists() and not (path / peft.CONFIG).exists():
        raise InputError(f"{path} holds neither {peft.CONFIG} (an adapter) nor {INDEX} (a library)")
    return (path / INDEX).exists()

"""What a result rests on: the command, the versions and devices it ran with, its inputs' hashes."""

import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lora_jax import __version__
from lora_jax.files import folder_digest

# Whose version can change a result.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def environment() -> dict[str, Any]:
    """The command line, the versions and the devices of this process, as JSON has them."""
    ours = {"lora_jax": __version__, "python": platform.python_version()}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": ours | {package: version(package) for package in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def hashed(folders: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """The path and the sha256 of each model, adapter or library folder, by name."""
    return {
        name: {"path": str(path), "sha256": folder_digest(path)} for name, path in folders.items()
    }

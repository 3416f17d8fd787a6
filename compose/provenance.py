"""Where a composed module came from, as the JSON that is written beside it."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from lora_jax.files import folder_digest

FILE = "provenance.json"

Errors = Mapping[str, Mapping[str, jax.Array]]  # by a library's member, or "", then projection


def record(
    expression: str,
    inputs: Mapping[str, Path],
    *,
    space: str,
    rank: int | None,
    base_name: str,
    errors: Errors,
) -> dict[str, Any]:
    """Everything needed to make the module again, and how much recompression lost.

    A truncation error is relative, in the Frobenius norm, one a layer.
    """
    return {
        "expression": expression,
        "space": space,
        "rank": rank,
        "inputs": {
            name: {"path": str(path), "sha256": folder_digest(path)}
            for name, path in inputs.items()
        },
        "base_model_name_or_path": base_name,
        "versions": {
            "lora_jax": lora_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "truncation_error": {
            member: {path: np.asarray(error).tolist() for path, error in by_path.items()}
            for member, by_path in errors.items()
        },
    }

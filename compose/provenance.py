"""Where a composed module came from, as the JSON that is written beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.provenance import environment, hashed

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
        "inputs": hashed(inputs),
        "base_model_name_or_path": base_name,
        **environment(),
        "truncation_error": {
            member: {path: np.asarray(error).tolist() for path, error in by_path.items()}
            for member, by_path in errors.items()
        },
    }

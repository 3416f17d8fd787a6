"""Where a composed module came from, as the JSON that is written beside it.

With it go the records of what its inputs were made of, by their sha256, as far back as they tell.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.errors import InputError
from lora_jax.files import read_json
from lora_jax.provenance import environment, hashed

FILE = "provenance.json"
TRAINED = "training.json"  # beside a module that was trained
_MADE = ("expression", "space", "rank", "recipe", "step", "inputs")  # what ancestors tell

Errors = Mapping[str, Mapping[str, jax.Array]]  # by a library's member, or "", then projection


def record(
    made: Mapping[str, Any], inputs: Mapping[str, Path], *, base_name: str, errors: Errors
) -> dict[str, Any]:
    """Everything needed to make the module again, and how much recompression lost.

    `made` says how: {"expression", "space", "rank"}, or {"recipe", "step"}. A truncation error is
    relative, in the Frobenius norm, one a layer.
    """
    hashes = hashed(inputs)
    return {
        **made,
        "inputs": hashes,
        "ancestors": ancestors(hashes),
        "base_model_name_or_path": base_name,
        **environment(),
        "truncation_error": {
            member: {path: np.asarray(error).tolist() for path, error in by_path.items()}
            for member, by_path in errors.items()
        },
    }


def ancestors(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """How the inputs, as `hashed` tells them, and all before them were made, by sha256."""
    found: dict[str, dict[str, Any]] = {}
    for told in inputs.values():
        folder = Path(told["path"])
        composed, trained = _read(folder / FILE), _read(folder / TRAINED).get("config")
        if _is_made(composed):
            known = composed.get("ancestors")
            found |= {k: v for k, v in _table(known).items() if _is_made(v) or _is_trained(v)}
            found[told["sha256"]] = {k: composed[k] for k in _MADE if k in composed}
        elif _is_trained({"training": trained}):
            run = {"data": _table(trained)["data"]}
            measured = {"fisher": True} if _table(trained).get("fisher") is True else {}
            found[told["sha256"]] = {"training": run | measured}
    return found


def _read(path: Path) -> dict[str, Any]:
    """A record, or nothing where there is none that can be read: a module is good without it."""
    try:
        return read_json(path)
    except (InputError, OSError):
        return {}


def _is_made(record: Any) -> bool:
    """Whether a record tells how a module was composed."""
    record = _table(record)
    inputs, rank = record.get("inputs"), record.get("rank")
    how = (
        [record.get("expression")]
        if "recipe" not in record
        else [record["recipe"], record.get("step")]
    )
    told = [
        one.get(key) for one in map(_table, _table(inputs).values()) for key in ("path", "sha256")
    ]
    plain = isinstance(rank, int | None) and record.get("space") in ("delta", "factor", None)
    return isinstance(inputs, dict) and plain and all(isinstance(x, str) for x in how + told)


def _is_trained(record: Any) -> bool:
    """Whether a record tells what a module was trained on."""
    data = _table(_table(record).get("training")).get("data")
    return isinstance(data, list) and all(isinstance(x, str) for x in data)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

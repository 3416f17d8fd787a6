"""What a router was given for each module, beside the module in a library's folder.

NAME/gates.safetensors and NAME/activations.safetensors hold a tensor (N, I) for each projection.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from compose.library import Library, Vectors
from lora_jax import models
from lora_jax.checkpoint import open_safetensors
from lora_jax.errors import InputError, refuse_all
from lora_jax.files import save_tensors

FILES = {router: f"{router}.safetensors" for router in ("gates", "activations")}


def save_vectors(folder: Path, library: Library) -> None:
    """Writes each module's vectors into its folder, which exists."""
    if unknown := [router for router in library.vectors if router not in FILES]:
        raise InputError(f"vectors for {', '.join(unknown)}; there are {', '.join(FILES)}")
    for router, held in library.vectors.items():
        for name, rows in zip(library.names, held, strict=True):
            if rows:
                tensors = {path: np.asarray(row) for path, row in rows.items()}
                save_tensors(folder / name / FILES[router], tensors)


def load_vectors(
    folder: Path, names: Sequence[str], config: models.Config
) -> dict[str, tuple[Vectors, ...]]:
    """The vectors of a library's modules by router, checked; no router that none is there for."""
    found = {}
    for router, file in FILES.items():
        paths = [folder / name / file for name in names]
        if any(path.exists() for path in paths):
            found[router] = tuple(_load(p, config) if p.exists() else {} for p in paths)
    return found


def _load(path: Path, config: models.Config) -> Vectors:
    """The vectors in a file, each of the sizes of its projection."""
    sizes = {name: shape[:-1] for name, shape in models.projections(config).items()}
    with open_safetensors(path) as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    problems = [f"no projection {name}" for name in rows if name not in sizes]
    problems += [
        f"{name} is {row.shape}, not {sizes[name]}"
        for name, row in rows.items()
        if name in sizes and row.shape != sizes[name]
    ]
    problems += [f"{name} holds NaN or infinite" for name, row in rows.items() if not _ends(row)]
    refuse_all(problems, str(path))
    return {name: jnp.asarray(row) for name, row in rows.items()}


def _ends(row: np.ndarray) -> bool:
    return bool(np.isfinite(row.astype(np.float32)).all())

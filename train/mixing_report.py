"""What a learned mixture came to: its weights as JSON, a table and a heat map."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from lora_jax.files import write_json
from lora_jax.provenance import hashed
from train.config import Mixing
from train.mixing import Mix

FILE = "mixing.json"
FIGURE = "mixing.png"
COLOURS = "RdBu_r"


def write_mixing(folder: Path, mixing: Mixing, mix: Mix, weights: Any, errors: Any) -> None:
    """Writes mixing.json and mixing.png beside the mixed module."""
    lists = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    one = {
        name: jax.tree.map(lambda x, n=n: np.round(x[n], 8).tolist(), lists)
        for n, name in enumerate(mix.names)
    }
    lost = {path: np.asarray(error).tolist() for path, error in errors.items()}
    record = {"per": mixing.per, "space": mixing.space, "weights": one, "truncation_error": lost}
    write_json(folder / FILE, record | {"modules": hashed(mix.folders)})
    draw_weights(lists, mix.names, folder / FIGURE)


def rows(weights: Any) -> dict[str, np.ndarray]:
    """The weights as tables (M, N) by projection, or one of all under ""; a lone one has N = 1."""
    by_path = weights if isinstance(weights, dict) else {"": weights}
    return {path: np.asarray(w).reshape(len(w), -1) for path, w in by_path.items()}


def weight_table(names: tuple[str, ...], weights: Any) -> Table:
    """Every module's mean weight, and the smallest and the largest where it has several."""
    table = Table("module", "weight", "smallest", "largest")
    flat = np.concatenate(list(rows(weights).values()), axis=1)
    for name, row in zip(names, flat, strict=True):
        ends = (f"{row.min():+.3f}", f"{row.max():+.3f}") if len(row) > 1 else ("", "")
        table.add_row(name, f"{row.mean():+.3f}", *ends)
    return table


def draw_weights(weights: Any, names: tuple[str, ...], path: Path) -> None:
    """Writes a heat map as a PNG: modules down, layers across, a panel a projection."""
    from matplotlib.cm import ScalarMappable  # its import takes half a second
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    panels = rows(weights)
    limit = max(float(np.abs(panel).max()) for panel in panels.values()) or 1.0
    width = max(panel.shape[1] for panel in panels.values())
    height = 0.8 + len(panels) * (0.6 + 0.25 * len(names))
    figure = Figure(figsize=(3 + 0.25 * max(width, 8), height), layout="constrained")
    every = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, panel) in zip(every, panels.items(), strict=True):
        axes.imshow(panel, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title or "mixing weights", xlabel="layer" if width > 1 else "")
        if panel.shape[1] == 1:
            axes.set_xticks([])
            for n, value in enumerate(panel[:, 0]):
                axes.text(0, n, f"{value:+.3f}", ha="center", va="center")
    scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
    figure.colorbar(scale, ax=list(every), label="weight")
    figure.savefig(path, dpi=120)

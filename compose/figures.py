"""Figures of what is measured between modules, as files."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from compose.similarity import Similarity
from lora_jax.errors import InputError
from lora_jax.files import write_bytes

KINDS = (".png", ".svg", ".pdf")
_WRITTEN = 16  # modules up to which a map has its numbers in it


def draw_similarity(found: Similarity, path: Path, *, projection: str | None = None) -> None:
    """Writes a heat map of a library's modules against each other, overall or at a projection."""
    values, where = found.overall, "all projections"
    if projection is not None:
        if projection not in found.projections:
            has = ", ".join(found.projections)
            raise InputError(f"no projection {projection!r} was measured; there are {has}")
        values, where = found.projections[projection], projection
    what, lowest = f"Overlap of {found.measure} subspaces", 0.0
    if found.measure == "cosine":
        what, lowest = "Cosine of deltas", -1.0
    heat_map(values, found.names, path, title=f"{what}, {where}", lowest=lowest)


def heat_map(
    values: np.ndarray, names: Sequence[str], path: Path, *, title: str, lowest: float = -1.0
) -> None:
    """Writes a square of values (M, M) from `lowest` to 1 as coloured cells, whole or not at all.

    The file's ending says its kind; cells have their numbers in them where there is room.
    """
    from matplotlib.figure import Figure  # its import takes half a second

    if path.suffix not in KINDS:
        raise InputError(f"{path}: a figure's file ends in {', '.join(KINDS)}")
    count = len(names)
    side = 2.5 + (0.6 if count <= _WRITTEN else 0.2) * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    colours = "RdBu_r" if lowest < 0 else "viridis"
    image = axes.imshow(values, cmap=colours, vmin=lowest, vmax=1)
    axes.set_xticks(np.arange(count), names, rotation=90)
    axes.set_yticks(np.arange(count), names)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8)
    if count <= _WRITTEN:
        dark = (values - lowest) / (1 - lowest)
        for (row, column), value in np.ndenumerate(values):
            pale = 0.25 < dark[row, column] < 0.75 if lowest < 0 else dark[row, column] > 0.6
            colour = "black" if pale else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    data = BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=120)
    write_bytes(path, data.getvalue())

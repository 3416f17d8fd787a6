"""What was composed, as tables: how large each module is, and how alike the inputs are."""

from collections.abc import Mapping

import jax
import numpy as np
from rich.table import Table

from compose.geometry import cosine, norm
from compose.library import Library
from compose.provenance import Errors
from compose.routing.settings import told
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, describe

MANY = 8  # modules whose cosines still fit on a screen

Named = tuple[str, Adapter]


def members(name: str, value: Adapter | Library) -> list[Named]:
    """A module under its name, or a library's modules under theirs."""
    if not isinstance(value, Library):
        return [(name, value)]
    names = (f"{name}.{member}" for member in value.names)
    return list(zip(names, value.adapters, strict=True))


def sizes(
    inputs: Mapping[str, Adapter | Library],
    result: Adapter | Library,
    errors: Errors,
    merges: Errors | None = None,
) -> Table:
    """A table of every module's kind and norm, and what low ranks cost merges and the result."""
    table = Table(caption=_caption(result))
    table.add_column("module", overflow="fold")
    table.add_column("what it is")
    table.add_column("norm", justify="right")
    table.add_column("lost to rank", justify="right")
    for name, adapter in _all_members(inputs):
        table.add_row(name, describe(adapter), length(adapter), "")
    table.add_section()
    for text, by_path in (merges or {}).items():
        table.add_row(text, "merged", "", lost(by_path))
    losses = [lost(by_path) for by_path in errors.values()]
    rows = members("result", result)
    for (name, adapter), loss in zip(rows, losses or [""] * len(rows), strict=True):
        table.add_row(name, describe(adapter), length(adapter), loss)
    return table


def length(adapter: Adapter) -> str:
    """The norm of what a module adds, in digits."""
    try:
        return f"{float(norm(adapter)):.4g}"
    except InputError:  # DoRA: that depends on the base
        return "-"


def _all_members(inputs: Mapping[str, Adapter | Library]) -> list[Named]:
    return [row for name, value in inputs.items() for row in members(name, value)]


def _caption(result: Adapter | Library) -> str | None:
    """How a library is routed, in words."""
    if not isinstance(result, Library) or result.routing is None:
        return None
    return f"routed by {told(result.routing)}"


def lost(by_path: Mapping[str, jax.Array]) -> str:
    """The mean and the largest relative truncation error over layers and projections."""
    flat = np.concatenate([np.ravel(error) for error in by_path.values()] or [np.zeros(1)])
    return f"{flat.mean():.1%} (max {flat.max():.1%})"


def cosines(inputs: Mapping[str, Adapter | Library]) -> Table | None:
    """A table of the cosine between every two inputs; None for one input or too many."""
    rows = _all_members(inputs)
    if not 2 <= len(rows) <= MANY:
        return None
    table = Table("cosine", *(name for name, _ in rows))
    for n, (name, adapter) in enumerate(rows):
        table.add_row(name, *(_cosine(adapter, other) for _, other in rows[: n + 1]))
    return table


def _cosine(x: Adapter, y: Adapter) -> str:
    """A cosine as it is shown; a dash for modules of two kinds."""
    try:
        return f"{float(cosine(x, y)):+.3f}"
    except InputError:  # of two kinds: nothing to compare
        return "-"

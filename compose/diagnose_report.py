"""A diagnosis as tables and as JSON."""

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from compose.diagnose import Diagnosis, Routed, balance, by_layer, prototype_pairs
from compose.diagnose_words import words

FILE = "diagnosis.json"
MANY = 28  # pairs that still fit on a screen: those of eight modules


def as_json(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON values, with its words."""
    pairs = {name: [asdict(pair) for pair in rows] for name, rows in prototype_pairs(found).items()}
    return _plain(asdict(found) | {"prototype_pairs": pairs, "words": words(found)})


def _plain(value: Any) -> Any:
    """A value whose arrays are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return np.asarray(value).tolist() if hasattr(value, "dtype") else value


def tables(found: Diagnosis) -> list[Table]:
    """Tables of all modules, of pairs of prototypes, and of each routed result's layers."""
    pairs = _pairs(found)
    return [
        modules(found),
        *([pairs] if 0 < pairs.row_count <= MANY else []),
        *(_layers(name, routed) for name, routed in found.routing.items()),
    ]


def modules(found: Diagnosis) -> Table:
    """A row for every input's module and every result's."""
    spaces = " and ".join(sorted({result.space for result in found.results.values()}))
    shown = Table(title=f"{found.composition}, in {spaces} space")
    shown.add_column("module", overflow="fold")
    for column in ("norm", "effective rank", "first draw in a"):
        shown.add_column(column, justify="right")
    for column in ("interaction", "gap between the spaces"):
        shown.add_column(column, justify="right")
    for name, labels in found.modules.items():
        if name in found.results:
            shown.add_section()
        for label in labels:
            shares = (found.initial, found.interaction, found.gap)
            shown.add_row(
                label,
                f"{found.norms[label]:.4g}",
                f"{found.effective_ranks[label]:.2f}",
                *(_share(part.get(label)) for part in shares),
            )
    return shown


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _pairs(found: Diagnosis) -> Table:
    """A row for every two modules of a library: how alike their prototypes are."""
    shown = Table("|cosine| of prototypes", "before", "after")
    for pairs in prototype_pairs(found).values() if found.prototypes.any() else []:
        shown.add_section()
        for pair in pairs:
            values = ("" if v is None else f"{v:.3f}" for v in (pair.before, pair.after))
            shown.add_row(", ".join(pair.modules), *values)
    return shown


def _layers(name: str, routed: Routed) -> Table:
    """A row for every layer: the entropy of a token's weights, its share, and that of their mean.

    The share is of the largest entropy that weights of so many modules can have.
    """
    bound = np.log(routed.top_k) or 1.0
    shown = Table("layer", "routing entropy (nats)", "of its largest", "of the mean weights")
    shown.title = f"routing of {name}"
    for layer, (entropy, mean) in enumerate(zip(by_layer(routed), balance(routed), strict=True)):
        shown.add_row(str(layer), f"{entropy:.3f}", f"{entropy / bound:.1%}", f"{mean:.3f}")
    return shown

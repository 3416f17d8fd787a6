"""A diagnosis as a table, in words, as JSON and as a figure."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from compose.diagnose import Diagnosis

FILE = "diagnosis.json"
FIGURE = "diagnosis.png"


def as_json(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON values, with its words."""
    return {**asdict(found), "cosines": found.cosines.tolist(), "words": words(found)}


def table(found: Diagnosis) -> Table:
    """A row for every input and every result."""
    shown = Table(title=f"{found.expression}, in {found.space} space")
    shown.add_column("module", overflow="fold")
    for column in ("norm", "effective rank", "first draw in a"):
        shown.add_column(column, justify="right")
    for column in ("interaction", "gap between the spaces"):
        shown.add_column(column, justify="right")
    for name, length in found.norms.items():
        if found.results and name == found.results[0]:
            shown.add_section()
        shown.add_row(
            name,
            f"{length:.4g}",
            f"{found.effective_ranks[name]:.2f}",
            *(_share(part.get(name)) for part in (found.initial, found.interaction, found.gap)),
        )
    return shown


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def words(found: Diagnosis) -> list[str]:
    """What the numbers say, a sentence each."""
    told = []
    for name in found.results:
        told.append(_size(found, name))
        told += _likeness(found, name)
        if (share := found.interaction[name]) > 0.01:
            told.append(f"{share:.0%} of {name} comes of no input alone: {_why(found)}.")
        if (gap := found.gap.get(name, 0.0)) > 0.01:
            told.append(
                f"In the other space it would differ by {gap:.0%} of the exact result's size."
            )
    return told + _first_draws(found) + _prototypes(found)


def _size(found: Diagnosis, name: str) -> str:
    """How large a result is next to the largest input."""
    inputs = {n: size for n, size in found.norms.items() if n not in found.results}
    largest = max(inputs, key=lambda n: inputs[n])
    if not inputs[largest]:
        return f"{name} has norm {found.norms[name]:.3g}; every input adds nothing."
    times = found.norms[name] / inputs[largest]
    return f"{name} is {times:.2f} times as large as {largest}, the largest input."


def _likeness(found: Diagnosis, name: str) -> list[str]:
    """Which input a result is most like."""
    order = list(found.norms)
    inputs = [n for n in order if n not in found.results]
    row = found.cosines[order.index(name)]
    best = max(inputs, key=lambda n: abs(row[order.index(n)]))
    return [f"It is most like {best}, at a cosine of {row[order.index(best)]:+.2f}."]


def _why(found: Diagnosis) -> str:
    if found.space == "factor":
        return "cross terms, each module's a with another's b, which delta space does not have"
    return "the method weighs modules against each other, entry by entry or direction by direction"


def _first_draws(found: Diagnosis) -> list[str]:
    """What composition did to the share of the a's that is their initialisation."""
    before = [share for name, share in found.initial.items() if name not in found.results]
    after = [share for name, share in found.initial.items() if name in found.results]
    if not before or not after:
        return []
    was, is_now = float(np.mean(before)), float(np.mean(after))
    text = f"Of the inputs' a's {was:.0%} is their first draw; of the results' {is_now:.0%}."
    if was - is_now > 0.2:
        text += " Taking that away is not taking knowledge away: compare with untrained()."
    return [text]


def _prototypes(found: Diagnosis) -> list[str]:
    """How well Arrow can tell a library's modules apart, before and after."""
    before = [value for name, value in found.prototypes.items() if name != "result"]
    if not before or "result" not in found.prototypes:
        return []
    now = found.prototypes["result"]
    return [
        f"The modules' prototypes have a mean cosine of {now:.2f}, against {before[0]:.2f} before."
    ]


def draw(found: Diagnosis, path: Path) -> None:
    """Writes norms and cosines as a PNG."""
    from matplotlib.figure import Figure  # its import takes half a second

    names, count = list(found.norms), len(found.norms)
    side = 2.5 + 0.35 * count
    figure = Figure(figsize=(2 * side, side), layout="constrained")
    bars, heat = figure.subplots(1, 2)
    colours = ["tab:orange" if name in found.results else "tab:blue" for name in names]
    bars.barh(names, list(found.norms.values()), color=colours)
    bars.invert_yaxis()
    bars.set(title="norm of what each adds (results in orange)")
    image = heat.imshow(found.cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    heat.set_xticks(range(count), names, rotation=45, ha="right")
    heat.set_yticks(range(count), names)
    heat.set(title="cosine")
    figure.colorbar(image, ax=heat)
    figure.savefig(path, dpi=120)

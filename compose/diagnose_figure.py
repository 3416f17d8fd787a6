"""A diagnosis as one figure: bars for every module, maps of every two, and routing by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compose.diagnose import Diagnosis, balance, by_layer

FIGURE = "diagnosis.png"
INPUT, RESULT = "tab:blue", "tab:orange"
_WRITTEN = 12  # modules up to which a map has its numbers in it
_LONGEST = 24  # letters of a name that are shown


def draw(found: Diagnosis, path: Path) -> None:
    """Writes three panels of bars as a PNG, below them two maps and the routing if it is known."""
    from matplotlib.figure import Figure  # its import takes half a second

    count = len(found.norms)
    heights = (1.2 + 0.3 * count, 3.5 + 0.3 * count)
    figure = Figure(figsize=(17, sum(heights)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    norms, ranks, shares = above.subplots(1, 3, sharey=True)
    _bars(norms, found, found.norms, "norm of what each adds (results in orange)")
    _bars(ranks, found, found.effective_ranks, "effective rank")
    _shares(shares, found)
    panels = below.subplots(1, 3 if found.routing else 2)
    _map(panels[0], found, found.cosines, "cosine of what they add", -1.0)
    _map(panels[1], found, found.prototypes, "|cosine| of prototypes", 0.0)
    if found.routing:
        _routing(panels[2], found)
    figure.savefig(path, dpi=110)


def _labels(found: Diagnosis) -> list[str]:
    """The modules' names, long ones cut."""
    return [n if len(n) <= _LONGEST else n[: _LONGEST - 1] + "…" for n in found.norms]


def _bars(axes: Any, found: Diagnosis, values: Mapping[str, float], title: str) -> None:
    """A bar for every module, from the first at the top, with its number beside it."""
    made = {module for name in found.results for module in found.modules[name]}
    colours = [RESULT if name in made else INPUT for name in found.norms]
    places = range(len(found.norms))
    bars = axes.barh(places, [values[name] for name in found.norms], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.15)
    axes.set_yticks(places, _labels(found))
    axes.set_ylim(len(found.norms) - 0.5, -0.5)
    axes.set(title=title)


def _shares(axes: Any, found: Diagnosis) -> None:
    """Two bars for every module: what is of no input alone, and what of its a's is first draws."""
    told = {"of no input alone": found.interaction, "first draw, of a": found.initial}
    colours = ("tab:red", "tab:gray")
    for n, ((label, values), colour) in enumerate(zip(told.items(), colours, strict=True)):
        rows = [(y, values[name]) for y, name in enumerate(found.norms) if name in values]
        places = [y + 0.4 * n - 0.2 for y, _ in rows]
        bars = axes.barh(places, [v for _, v in rows], 0.4, color=colour, label=label)
        axes.bar_label(bars, [f"{v:.0%}" if v >= 0.005 else "" for _, v in rows], padding=3)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set(title="shares")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, fontsize="small")


def _map(axes: Any, found: Diagnosis, values: np.ndarray, title: str, lowest: float) -> None:
    """A square of values from `lowest` to 1, the results' modules beyond a line."""
    labels = _labels(found)
    colours = "RdBu_r" if lowest < 0 else "viridis"
    image = axes.imshow(values, cmap=colours, vmin=lowest, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    made = sum(len(found.modules[name]) for name in found.results)
    for line in (axes.axhline, axes.axvline):
        line(len(labels) - made - 0.5, color="black", linewidth=1)
    if len(labels) <= _WRITTEN:
        _write(axes, values, lowest)
    axes.set(title=title)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _write(axes: Any, values: np.ndarray, lowest: float) -> None:
    """Each cell's number in it, in black where the colour is pale."""
    for (row, column), value in np.ndenumerate(values):
        pale = abs(value) < 0.5 if lowest < 0 else value > 0.6
        colour = "black" if pale else "white"
        text = f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")


def _routing(axes: Any, found: Diagnosis) -> None:
    """The entropy of routing by layer, of tokens' own weights and of their mean, under bounds."""
    for n, (name, routed) in enumerate(found.routing.items()):
        colour = f"C{n}"
        axes.plot(by_layer(routed), color=colour, marker=".", label=f"{name}: a token's weights")
        mean = balance(routed)
        axes.plot(mean, color=colour, marker="x", linestyle="--", label=f"{name}: their mean")
    bounds = {k for routed in found.routing.values() for k in (routed.top_k, len(routed.modules))}
    for bound in sorted(bounds - {1}):
        axes.axhline(np.log(bound), color="black", linewidth=0.8, linestyle=":")
        axes.annotate(f"log {bound}", (0, np.log(bound)), va="bottom", fontsize="small")
    axes.set(title="entropy of routing", xlabel="layer", ylabel="nats")
    axes.set_ylim(-0.02 * np.log(max(bounds)), 1.08 * np.log(max(bounds)))
    axes.legend(loc="best", fontsize="small")

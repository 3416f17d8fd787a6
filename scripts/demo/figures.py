"""The report's figures, as SVG text to be put into the page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt

from eval.results import Line
from scripts.demo.stages import Routing, Sweep, Unlearning

plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})


def _svg(figure: Any) -> str:
    """A figure as an <svg> element, without the XML prologue."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return re.sub(r"(?s)^.*?(?=<svg)", "", text.getvalue())


def losses(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Every module's training loss by step, smoothed."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, record in records.items():
        points = [(row["step"], row["loss"]) for row in record["metrics"] if "loss" in row]
        steps, values = zip(*points, strict=True)
        width = min(5, len(values))
        smooth = np.convolve(np.pad(values, (width - 1, 0), mode="edge"), np.ones(width) / width)
        axes.plot(steps, smooth[width - 1 : width - 1 + len(steps)], label=name)
    axes.set(xlabel="step", ylabel="nats per learned token")
    axes.legend(ncols=2, fontsize=8)
    return _svg(figure)


def sweep(found: Sweep) -> str:
    """Accuracy on both tasks along λ, in factor and in delta space, with 95 % intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = {"factor": "factor space (PEM: each tensor averaged)", "delta": "delta space (exact)"}
    for axes, (space, title) in zip(panels, titles.items(), strict=True):
        for task, lines in found.accuracy[space].items():
            values = np.array([line.value.value for line in lines])
            low = values - [line.value.low for line in lines]
            high = [line.value.high for line in lines] - values
            axes.errorbar(found.weights, values, (low, high), marker="o", capsize=3, label=task)
        axes.set(title=title, xlabel=f"λ: weight of {found.first}, 1 - λ of {found.second}")
    panels[0].set(ylabel="accuracy, held-out", ylim=(0, 1.05))
    panels[0].legend(title="task")
    return _svg(figure)


def unlearning(points: Sequence[Unlearning]) -> str:
    """The habit's rate against neutral perplexity, a point a strength."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for name in dict.fromkeys(point.name for point in points):
        own = [point for point in points if point.name == name]
        x, y = [p.perplexity for p in own], [p.exclaimed for p in own]
        axes.plot(x, y, "o-" if name == "cheers" else "s", label=name)
        for p in own:
            at = (p.perplexity, p.exclaimed)
            axes.annotate(f"{p.strength:+g}", at, textcoords="offset points", xytext=(4, 6))
    axes.set(
        xlabel="perplexity on neutral text", ylabel="sentences that exclaim", ylim=(-0.05, 1.05)
    )
    axes.legend(title="module, at strength")
    return _svg(figure)


def columns(found: Routing) -> str:
    """Mean accuracy over the tasks, a bar a column, with the spread of tasks as dots."""
    names = [line.column for line in next(iter(found.lines.values()))]
    table = np.array([[line.value.value for line in lines] for lines in found.lines.values()])
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    axes.barh(names, table.mean(axis=0), color="tab:blue", alpha=0.35)
    for task, row in zip(found.lines, table, strict=True):
        axes.plot(row, names, "o", label=task, markersize=5)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, held-out: bar the mean, dots the tasks", xlim=(0, 1.02))
    axes.legend(fontsize=8, loc="lower right")
    return _svg(figure)


def shares(found: Routing) -> str:
    """Where each task's tokens were routed: a panel a task, layers across, modules down."""
    names = list(found.shares)
    figure, panels = plt.subplots(
        1, len(names), figsize=(10, 2.4), sharey=True, layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        image = axes.imshow(found.shares[name].T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set(title=f"tokens of {name}", xlabel="layer", yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.grid(False)
    figure.colorbar(image, ax=panels[0], label="share")
    return _svg(figure)


def intervals(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """Each column's accuracy and its paired difference from the first, in words for a table."""
    rows = []
    for line in lines:
        value, gap = line.value, line.difference
        shown = f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
        against = f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]" if gap else ""
        rows.append((line.column, shown, against))
    return rows

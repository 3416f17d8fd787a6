"""A sweep to look at: each task's result along a number, and two tasks against each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.columns import Column
from eval.results import Line

CURVES = "sweep.png"
FRONT = "pareto.png"


def on_front(gains: np.ndarray) -> np.ndarray:
    """Which of points (P, K) no other beats in one gain without losing in another: a mask (P,)."""
    others, own = gains[None], gains[:, None]
    beaten = np.all(others >= own, axis=2) & np.any(others > own, axis=2)
    return np.logical_not(np.any(beaten, axis=1))


def draw(numbers: Sequence[Line], columns: Sequence[Column], folder: Path) -> None:
    """Writes the figures that the sweep in the columns has; none if nothing is swept."""
    swept = [column for column in columns if column.setting]
    tasks = list(dict.fromkeys(line.task for line in numbers))
    if not swept or not tasks:
        return
    found = {(line.task, line.column): line for line in numbers}
    if all(len(column.setting) == 1 for column in swept):
        _curves(found, tasks, columns, folder / CURVES)
    if len(tasks) > 1:
        _fronts(found, tasks, columns, folder / FRONT)


def _label(line: Line) -> str:
    return "accuracy, %" if line.metric == "accuracy" else "perplexity"


def _shown(line: Line, value: float) -> float:
    return 100 * value if line.metric == "accuracy" else float(np.exp(value))


def _gain(line: Line) -> float:
    return line.value.value if line.metric == "accuracy" else -line.value.value


def _groups(columns: Sequence[Column]) -> Mapping[str, list[Column]]:
    """The swept columns by the recipe they come from, in the order of their settings."""
    groups: dict[str, list[Column]] = {}
    for column in columns:
        if column.setting:
            groups.setdefault(column.group, []).append(column)
    return {name: sorted(g, key=lambda c: [*c.setting.values()]) for name, g in groups.items()}


def _curves(
    found: Mapping[tuple[str, str], Line], tasks: list[str], columns: Sequence[Column], path: Path
) -> None:
    """A panel a task: its result along the swept number, its interval, other columns as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        for group, members in _groups(columns).items():
            lines = [found[task, column.name] for column in members]
            places = [next(iter(column.setting.values())) for column in members]
            low, mid, high = (
                [_shown(line, getattr(line.value, end)) for line in lines]
                for end in ("low", "value", "high")
            )
            axes.plot(places, mid, "o-", markersize=3, label=group)
            axes.fill_between(places, low, high, alpha=0.2)
        for column in columns:
            if not column.setting:
                line = found[task, column.name]
                axes.axhline(_shown(line, line.value.value), color="grey", linestyle=":")
        names = dict.fromkeys(name for c in columns for name in c.setting)
        axes.set(title=task, ylabel=_label(found[task, columns[0].name]), xlabel=", ".join(names))
    panels[0].legend()
    figure.savefig(path, dpi=120)


def _fronts(
    found: Mapping[tuple[str, str], Line], tasks: list[str], columns: Sequence[Column], path: Path
) -> None:
    """A panel for the first task against every other; what nothing beats is ringed and named."""
    from matplotlib.figure import Figure

    first, *others = tasks
    figure = Figure(figsize=(6 * len(others), 5), layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    for axes, other in zip(panels, others, strict=True):
        pairs = [(found[first, c.name], found[other, c.name]) for c in columns]
        best = on_front(np.asarray([[_gain(x), _gain(y)] for x, y in pairs]))
        for column, (x, y), front in zip(columns, pairs, best, strict=True):
            at = (_shown(x, x.value.value), _shown(y, y.value.value))
            axes.plot(*at, "o", color="tab:blue" if column.setting else "black", markersize=4)
            if front:
                axes.plot(*at, "o", markersize=10, fillstyle="none", color="tab:orange")
                axes.annotate(
                    column.name, at, textcoords="offset points", xytext=(6, 4), fontsize=7
                )
        x, y = pairs[0]
        axes.set(xlabel=f"{first}: {_label(x)}", ylabel=f"{other}: {_label(y)}")
        axes.set_title("ringed: nothing is better in both")
    figure.savefig(path, dpi=120)

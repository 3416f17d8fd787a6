"""Results to look at: a table for the terminal, and a chart with intervals."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from eval.results import Line, Replies
from eval.statistics import Interval

Show = Callable[[float], str]


@np.errstate(over="ignore")  # a perplexity may be inf
def table(numbers: Sequence[Line]) -> Table:
    """Every number with its 95 % interval, and its paired difference from the first column.

    Accuracies are in percent and their differences in points; a text has its perplexity, whose
    difference is relative.
    """
    found = Table(box=box.SIMPLE_HEAD, caption="intervals: 95 %, bootstrap over examples")
    found.add_column("module", overflow="fold")
    first = escape(numbers[0].column)
    for heading in ("result", "interval", f"vs {first}", "interval"):
        found.add_column(heading, justify="right", no_wrap=True)
    for n, line in enumerate(numbers):
        if not n or line.task != numbers[n - 1].task:
            found.add_section()
            found.add_row(f"[bold]{escape(line.task)}[/] ({line.examples:,})")
        result, change = _units(line)
        cells = [*_cells(line.value, result), *_cells(line.difference, change)]
        found.add_row(escape(line.column), *cells)
    return found


def _units(line: Line) -> tuple[Show, Show]:
    """How a line's number is shown, and how its difference is."""
    if line.metric == "accuracy":
        return lambda x: f"{100 * x:.1f} %", lambda x: f"{100 * x:+.1f} points"
    return lambda x: f"{np.exp(x):.2f} ppl", lambda x: f"{100 * np.expm1(x):+.2f} %"


def _cells(interval: Interval | None, show: Show) -> tuple[str, str]:
    """A number and its interval as they are shown; empty if there is none."""
    if interval is None:
        return "", ""
    ends = (show(x).partition(" ")[0] for x in (interval.low, interval.high))
    return show(interval.value), " … ".join(ends)


def group_table(name: str, groups: Mapping[str, Mapping[str, float]]) -> Table:
    """A task's accuracy by group and column, in percent."""
    found = Table(escape(name))
    for column in next(iter(groups.values())):
        found.add_column(escape(column), justify="right")
    for group, values in groups.items():
        found.add_row(escape(group), *(f"{100 * value:.1f}" for value in values.values()))
    return found


def reply_table(outcome: Replies) -> Table:
    """What every column wrote, prompt by prompt."""
    found = Table("prompt", "module", "reply", show_lines=True)
    for n, prompt in enumerate(outcome.prompts):
        for column, replies in outcome.replies.items():
            found.add_row(escape(prompt), escape(column), escape(replies[n]) or "(ended at once)")
    return found


def chart(numbers: Sequence[Line], path: Path) -> None:
    """Writes a PNG of the accuracies as bars with their intervals, grouped by task."""
    from matplotlib.figure import Figure

    shown = [line for line in numbers if line.metric == "accuracy"]
    tasks = list(dict.fromkeys(line.task for line in shown))
    columns = list(dict.fromkeys(line.column for line in shown))
    figure = Figure(figsize=(2 + 0.5 * len(tasks) * (len(columns) + 1), 4), layout="constrained")
    axes = figure.subplots()
    width, bars = 0.8 / len(columns), []
    for n, column in enumerate(columns):
        values = [line.value for line in shown if line.column == column]
        heights = 100 * np.array([v.value for v in values])
        whiskers = 100 * np.array(
            [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        )
        places = np.arange(len(tasks)) + (n - (len(columns) - 1) / 2) * width
        bars.append(axes.bar(places, heights, 0.9 * width, yerr=whiskers, capsize=3))
    axes.set_xticks(np.arange(len(tasks)), tasks)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(bars, columns, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)

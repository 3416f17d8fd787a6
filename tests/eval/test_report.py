"""Tables and chart show every number of every column, whatever the columns are called."""

import io

import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from rich.console import Console

from eval import report
from eval.results import Line, Replies
from eval.statistics import Interval

COLUMNS = ("base", "_a", "gks(a, [b])")
ACCURACY = {"arc": (0.25, 0.5, 0.125), "mine [v2]": (0.75, 0.625, 1.0)}


def lines(task, metric, values):
    """A line a column, with an interval of 0.1 to each side."""
    made = [Interval(value, value - 0.1, value + 0.1) for value in values]
    apart = [None, *(Interval(v - values[0], -0.1, 0.1) for v in values[1:])]
    return [
        Line(task, column, metric, 1234, value, difference)
        for column, value, difference in zip(COLUMNS, made, apart, strict=True)
    ]


@pytest.fixture
def numbers():
    """Two tasks and a text, each of every column."""
    accuracies = [line for task, v in ACCURACY.items() for line in lines(task, "accuracy", v)]
    return accuracies + lines("wiki", "nats_per_token", (np.log(20), np.log(10), 1e4))


def shown(table) -> list[list[str]]:
    """The table's words as a wide terminal shows them, row by row."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return [line.split() for line in console.export_text().splitlines()]


def test_the_table_has_a_heading_a_task_and_a_row_a_number(numbers):
    rows = shown(report.table(numbers))
    headings = [" ".join(row) for row in rows if row and row[-1] == "(1,234)"]
    assert headings == ["arc (1,234)", "mine [v2] (1,234)", "wiki (1,234)"]
    for column in COLUMNS:
        assert sum(" ".join(row).startswith(column) for row in rows) == 3


def test_accuracies_are_per_cent_and_their_differences_points(numbers):
    base, other = [row for row in shown(report.table(numbers)) if row[:1] in (["base"], ["_a"])][:2]
    assert base == ["base", "25.0", "%", "15.0", "…", "35.0"]
    assert other == [
        "_a",
        "50.0",
        "%",
        "40.0",
        "…",
        "60.0",
        "+25.0",
        "points",
        "-10.0",
        "…",
        "+10.0",
    ]


def test_a_text_has_its_perplexity_and_relative_differences_even_beyond_floats(numbers):
    base, half, huge = (row for row in shown(report.table(numbers)) if "ppl" in row)
    assert base[:3] == ["base", "20.00", "ppl"] and "%" not in base
    assert half[:3] == ["_a", "10.00", "ppl"] and "-50.00" in half
    assert "inf" in huge


def test_groups_have_a_row_each_and_a_column_a_module():
    groups = {"[physics]": dict(zip(COLUMNS, (0.25, 0.5, 1.0), strict=True))}
    groups["law"] = dict.fromkeys(COLUMNS, 0.125)
    words = [" ".join(row) for row in shown(report.group_table("mmlu [de]", groups))]
    assert any(all(name in row for name in ("mmlu [de]", *COLUMNS)) for row in words)
    physics = next(row for row in words if "[physics]" in row)
    assert all(value in physics for value in ("25.0", "50.0", "100.0"))
    assert sum("12.5" in row for row in words) == 1


def test_differences_are_headed_by_the_column_they_are_from(numbers):
    assert ["vs", "base"] in [row[-3:-1] for row in shown(report.table(numbers))]


def test_a_reply_without_a_word_is_told():
    rows = shown(report.reply_table(Replies(["Say"], {"base": [""]})))
    assert any("(ended at once)" in " ".join(row) for row in rows)


def test_replies_are_shown_as_they_were_written():
    prompts = ["Say [hi]", "Go on"]
    replies = {column: [f"{column}: [bold]no[/] tag", "…"] for column in COLUMNS}
    text = "\n".join(" ".join(row) for row in shown(report.reply_table(Replies(prompts, replies))))
    assert all(f"{column}: [bold]no[/] tag" in text for column in COLUMNS)
    assert text.count("Say [hi]") == text.count("Go on") == len(COLUMNS)


@pytest.fixture
def drawn(monkeypatch, numbers, tmp_path):
    """The chart's figure, as it was saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    report.chart(numbers, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_the_chart_has_a_bar_for_every_accuracy_and_a_name_for_every_column(drawn):
    axes = drawn.axes[0]
    columns = [bars.patches for bars in axes.containers if isinstance(bars, BarContainer)]
    heights = [[patch.get_height() for patch in column] for column in columns]
    assert np.allclose(np.transpose(heights) / 100, list(ACCURACY.values()))
    assert [label.get_text() for label in axes.get_xticklabels()] == list(ACCURACY)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(COLUMNS)
    places = sorted(patch.get_x() for column in columns for patch in column)
    assert min(np.diff(places)) > 0.2  # side by side, none behind another

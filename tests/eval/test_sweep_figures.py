import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval import sweep_figures
from eval.columns import Column
from eval.results import Line
from eval.statistics import Interval

GAINS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


def beaten(point, others) -> bool:
    return any(o[0] >= point[0] and o[1] >= point[1] and o != point for o in others)


@given(GAINS)
def test_the_front_is_what_nothing_beats(points):
    found = sweep_figures.on_front(np.asarray(points, float))
    assert found.tolist() == [not beaten(p, points) for p in points]


def line(task, column, value):
    metric = "accuracy" if task == "arc" else "nats"
    return Line(task, column, metric, 10, Interval(value, value - 0.1, value + 0.1), None)


def drawn(folder, tasks, settings):
    columns = [Column("base", "base", {}, {}, "base")]
    columns += [Column(f"c {n}", "", {}, s, "c") for n, s in enumerate(settings)]
    numbers = [line(t, c.name, 0.5 + 0.01 * n) for t in tasks for n, c in enumerate(columns)]
    folder.mkdir()
    sweep_figures.draw(numbers, columns, folder)
    return {path.name for path in folder.iterdir() if path.stat().st_size > 1000}


def test_the_figures_are_those_that_the_sweep_has(tmp_path):
    one, two = [{"x": 0.0}, {"x": 1.0}], [{"x": 0.0, "y": 1.0}, {"x": 1.0, "y": 1.0}]
    assert drawn(tmp_path / "a", ["arc"], one) == {"sweep.png"}
    assert drawn(tmp_path / "b", ["arc", "text"], one) == {"sweep.png", "pareto.png"}
    assert drawn(tmp_path / "c", ["arc", "text"], two) == {"pareto.png"}
    assert drawn(tmp_path / "d", ["arc", "text"], []) == set()

"""What measuring many compositions of two modules costs, in one program and one by one."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from compose.arithmetic import weighted_sum
from eval import bench as benches
from eval.bench import Bench
from eval.columns import Column
from eval.config import Evaluation
from eval.tasks import Task, read_task
from lora_jax import models
from lora_jax.bases import Base, load_base
from lora_jax.tokens import Tokenizer, load_tokenizer
from scripts.benchmark_sweep import Settings
from scripts.demo import tasks
from scripts.per_example_cost import random_lora
from scripts.timing import show

WAYS = ("in one program", "one by one")


def report(settings: Settings) -> None:
    """Times both ways for every number of compositions, prints a table, and draws a figure."""
    base = load_base(settings.base)
    tokenizer = load_tokenizer(base.folder)
    targets = models.default_targets(base.config)
    shapes = models.projections(base.config)
    a, b = (
        {p: random_lora(shapes[p], seed, settings.rank) for p in shapes if p.endswith(targets)}
        for seed in (0, 1)
    )
    rows, taken = [], {}
    with tempfile.TemporaryDirectory() as folder:
        tasks.write_files(Path(folder), train=1, test=settings.questions)
        task = read_task(Path(folder) / "kind.json")
        for count in settings.compositions:
            columns = [
                Column(f"x={x:.3f}", "", weighted_sum([a, b], [1.0, -x], space="delta"))
                for x in np.linspace(0, 1, count)
            ]
            taken[count] = costs(base, tokenizer, columns, task)
            rows.append(_row(count, taken[count]))
    title = f"{settings.questions} questions of four choices under a - x b, rank {settings.rank}"
    heads = ["compositions", *(f"{way}, {when}" for way in WAYS for when in ("first", "again"))]
    show(title, [*heads, "again", "most apart"], rows)
    if settings.figure:
        _draw(taken, title, settings.figure)


def costs(
    base: Base, tokenizer: Tokenizer, columns: Sequence[Column], task: Task
) -> dict[str, tuple[float, float, np.ndarray]]:
    """For each way its seconds the first time, compiling, and again, and all scores."""
    groups = {WAYS[0]: [list(columns)], WAYS[1]: [[column] for column in columns]}
    found = {}
    for way, group in groups.items():
        made = [Bench(Evaluation(), base, tokenizer, each) for each in group]

        def work(made=made) -> list[np.ndarray]:
            outcomes = [benches.answers(bench, task).scores for bench in made]
            return [np.concatenate(values) for scores in outcomes for values in scores.values()]

        first, _ = _timed(work)
        again, scores = _timed(work)
        found[way] = first, again, np.stack(scores)
    return found


def _timed(work: Callable[[], list[np.ndarray]]) -> tuple[float, list[np.ndarray]]:
    """The seconds that work takes, and what it gives."""
    began = time.perf_counter()
    out = jax.block_until_ready(work())
    return time.perf_counter() - began, out


def _row(count: int, taken: dict[str, tuple[float, float, np.ndarray]]) -> list[str]:
    """A row of the table."""
    (one_first, one_again, one), (each_first, each_again, each) = (taken[way] for way in WAYS)
    seconds = [f"{s:.1f} s" for s in (one_first, one_again, each_first, each_again)]
    apart = f"{np.abs(one - each).max():.0e} nats"
    return [str(count), *seconds, f"{each_again / one_again:.2f}x", apart]


def _draw(taken: dict, title: str, path: Path) -> None:
    """Seconds by the number of compositions, of each way, first and again."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        for n, (when, style) in enumerate((("first", "--"), ("again", "-"))):
            seconds = [ways[way][n] for ways in taken.values()]
            axes.plot(list(taken), seconds, style, marker="o", label=f"{way}, {when}")
    axes.set(xlabel="compositions", ylabel="seconds", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)

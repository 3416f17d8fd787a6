"""How the benchmarks time: alternate the candidates, take medians, and show one table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def alternate(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """The median seconds of each candidate, after a warm-up, taken in turns so that all share the
    machine's good and bad moments."""
    taken = in_turns(candidates, rounds)
    return {name: statistics.median(times) for name, times in taken.items()}


def in_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each candidate in every round, after a warm-up."""
    import jax  # not before a benchmark's arguments are read

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        jax.block_until_ready(candidate())
    for _ in range(rounds):
        for name, candidate in candidates.items():
            began = time.perf_counter()
            jax.block_until_ready(candidate())
            times[name].append(time.perf_counter() - began)
    return times


def ratio(times: Sequence[float], against: Sequence[float]) -> float:
    """The median over the rounds of what `times` were of `against`: each round by itself, so that a
    machine's slow minutes weigh on both."""
    return statistics.median(one / other for one, other in zip(times, against, strict=True))


def interval(times: Sequence[float], against: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of `ratio`, by the order of the rounds' own ratios."""
    from scipy.stats import quantile_test

    ratios = [one / other for one, other in zip(times, against, strict=True)]
    found = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    return float(found.low), float(found.high)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table, its first column to the left and the rest to the right."""
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)

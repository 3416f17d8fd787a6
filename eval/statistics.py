"""How sure a number is: bootstrap intervals over examples, and paired differences."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % bootstrap interval (percentile)."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray, *, seed: int = 0) -> Interval:
    """The mean of `values` over examples."""
    return _bootstrap((values,), lambda v, axis: np.mean(v, axis=axis), seed)


def difference(values: np.ndarray, against: np.ndarray, *, seed: int = 0) -> Interval:
    """The mean of `values - against`, example by example: a paired comparison."""
    return mean(np.asarray(values, float) - np.asarray(against, float), seed=seed)


def ratio(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> Interval:
    """Σ sums / Σ counts over windows: nats a token, from each window's nats and tokens."""
    return _bootstrap(
        (sums, counts), lambda s, n, axis: np.sum(s, axis=axis) / np.sum(n, axis=axis), seed
    )


def _bootstrap(
    data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int
) -> Interval:
    """The statistic of examples drawn again and again; without spread, the value alone."""
    from scipy.stats import bootstrap

    data = tuple(np.asarray(column, float) for column in data)
    value = float(statistic(*data, axis=0))
    if all(np.ptp(column) == 0 for column in data):
        return Interval(value, value, value)
    found = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // len(data[0])),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))

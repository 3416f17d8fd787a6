"""Bootstrap intervals agree with closed forms, and degenerate data has none to speak of."""

import numpy as np
import pytest

from eval import statistics


def test_a_proportion_has_the_binomial_interval():
    values = np.arange(1000) < 620
    found = statistics.mean(values)
    half = 1.96 * np.sqrt(0.62 * 0.38 / 1000)
    assert found.value == 0.62
    assert found.low == pytest.approx(0.62 - half, abs=0.004)
    assert found.high == pytest.approx(0.62 + half, abs=0.004)


def test_pairing_removes_what_is_common():
    draw = np.random.default_rng(0)
    common = draw.normal(size=500)
    found = statistics.difference(common + 0.1 + 0.01 * draw.normal(size=500), common)
    assert found.high - found.low < 0.005 and found.low < 0.1 < found.high


def test_all_equal_has_no_width():
    assert statistics.mean(np.ones(5)) == statistics.Interval(1.0, 1.0, 1.0)
    assert statistics.difference(np.ones(5), np.ones(5)).high == 0


def test_one_example_has_no_width():
    assert statistics.mean(np.array([0.3])) == statistics.Interval(0.3, 0.3, 0.3)


def test_a_ratio_is_of_sums():
    found = statistics.ratio(np.array([10.0, 1.0, 4.0]), np.array([5.0, 1.0, 4.0]))
    assert found.value == 1.5
    assert 1.0 <= found.low < 1.5 < found.high <= 2.0


def test_the_seed_decides():
    values = np.arange(50) % 3
    assert statistics.mean(values, seed=1) == statistics.mean(values, seed=1)
    assert statistics.mean(values, seed=1) != statistics.mean(values, seed=2)

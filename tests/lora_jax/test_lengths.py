"""Lengths are few, hold every row, and waste little."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.lengths import GRID, assign, choose_lengths, round_up

sizes = st.lists(st.integers(1, 9000), min_size=1, max_size=60)


@given(st.integers(0, 20_000))
def test_a_length_holds_its_size(size):
    assert size <= round_up(size) <= max(2 * size, size + 1024, GRID[0])
    assert round_up(round_up(size)) == round_up(size)


@given(sizes, st.integers(1, 4))
def test_few_lengths_hold_every_row(sizes, most):
    lengths = choose_lengths(sizes, most)
    assert 1 <= len(lengths) <= most and list(lengths) == sorted(set(lengths))
    assert (assign(sizes, lengths) >= sizes).all()


@given(sizes)
def test_every_length_is_used_and_pays(sizes):
    lengths = choose_lengths(sizes)
    assert set(assign(sizes, lengths).tolist()) == set(lengths)
    for length in lengths[:-1]:
        fewer = [n for n in lengths if n != length]
        assert assign(sizes, fewer).sum() > assign(sizes, lengths).sum()


def test_the_smallest_length_that_holds_a_row_is_its_own():
    assert assign([1, 8, 9, 64], (8, 64)).tolist() == [8, 8, 64, 64]


def test_a_length_is_added_only_for_a_saving():
    mixed = [16] * 50 + [512] * 50
    assert choose_lengths(mixed) == (16, 512)
    assert choose_lengths([384] * 5 + [512] * 95) == (512,)
    assert choose_lengths(mixed, worth=0.6) == (512,)


@pytest.mark.parametrize("size", [8193, 9000, 10_240])
def test_beyond_the_grid_lengths_are_whole_thousands(size):
    assert round_up(size) % 1024 == 0 and np.ceil(size / 1024) * 1024 == round_up(size)

"""Lengths are few, hold every row, and waste little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.lengths import assign, bucket, choose_lengths

sizes = st.lists(st.integers(1, 9000), min_size=1, max_size=60)


@given(st.integers(0, 20_000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 8]))
def test_a_bucket_holds_its_size_and_little_more(size, steps, apart):
    found = bucket(size, steps=steps, apart=apart)
    assert size <= found <= max(size + apart - 1, size * (1 + 1 / steps))
    assert bucket(found, steps=steps, apart=apart) == found
    assert bucket(size + 1, steps=steps, apart=apart) >= found


@pytest.mark.parametrize(
    ("options", "buckets"),
    [
        ({}, [*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]),
        ({"steps": 2, "apart": 8}, [0, 8, 16, 24, 32, 48, 64]),
    ],
)
def test_buckets_are_even_steps_between_powers_of_two(options, buckets):
    assert sorted({bucket(size, **options) for size in range(65)}) == buckets


@given(sizes, st.integers(1, 4))
def test_few_lengths_hold_every_row(sizes, limit):
    lengths = choose_lengths(sizes, limit)
    assert 1 <= len(lengths) <= limit and list(lengths) == sorted(set(lengths))
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

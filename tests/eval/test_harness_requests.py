"""Requests of the harness as rows: what shares a row, what is cut, what is refused."""

import numpy as np
import pytest

from eval.generation import Sampling
from eval.harness_requests import item, sampling, together
from lora_jax.errors import InputError

GREEDY = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 8, "until": []}


def request(context, continuation):
    return (("", "text"), list(context), list(continuation))


def test_neighbours_with_one_context_share_a_row():
    a, b = [1, 2, 3], [1, 2, 4]
    asked = [request(a, [5]), request(a, [6, 7]), request(b, [5]), request(a, [5])]
    assert together(asked, 100) == [[0, 1], [2], [3]]
    assert together(asked, 5) == [[0], [1], [2], [3]]
    assert [len(group) for group in together([request(a, [5])] * 40, 1000)] == [16, 16, 8]
    assert together([], 10) == []


def test_each_continuation_counts_and_its_context_does_not():
    row = item([request([1, 2, 3], [4, 5]), request([1, 2, 3], [4, 6, 7])], 100)
    assert row.prefix.tokens.tolist() == [1, 2, 3, 4] and row.prefix.counted.tolist() == [
        *[False] * 3,
        True,
    ]
    assert [span.tokens.tolist() for span in row.rest] == [[5], [6, 7]]
    assert all(span.counted.all() for span in row.rest) and row.divisors == (1.0, 1.0)


def test_a_long_text_loses_its_beginning():
    row = item([request(range(20), [90, 91])], 8)
    text = np.concatenate([row.prefix.tokens, row.rest[0].tokens])
    assert text.tolist() == [13, 14, 15, 16, 17, 18, 19, 90, 91]


@pytest.mark.parametrize("continuation", [[], range(9)])
def test_nothing_to_score_and_too_much_are_refused(continuation):
    with pytest.raises(InputError, match=rf"'text' has {len(continuation)} tokens, of 1 to 8"):
        item([request([1], continuation)], 8)


def test_sampling_as_the_harness_says_it():
    assert sampling(GREEDY, 3) == Sampling(8, 0.0, seed=3)
    drawn = {"do_sample": True, "top_p": 0.5, "top_k": 4, "max_gen_toks": 8, "until": ["x"]}
    assert sampling(drawn, 0) == Sampling(8, 1.0, 0.5, 4)
    assert sampling(drawn | {"temperature": 0.3}, 0).temperature == 0.3
    with pytest.raises(InputError, match="num_beams=4 is not supported; presence_penalty=1"):
        sampling(GREEDY | {"presence_penalty": 1, "num_beams": 4}, 0)

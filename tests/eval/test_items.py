"""Items hold what choices share once, and count what the score's definition says."""

import numpy as np
import pytest

from eval.items import items
from eval.prompts import Question
from lora_jax.errors import InputError


def one(tokenizer, prompt, answers, score="answer_mean", context=128):
    n = len(answers)
    question = Question((prompt,) * n, answers, tuple(map(len, answers)), 0, "", "f line 3")
    return items([question], tokenizer, score=score, style="plain", context=context)[0]


def test_the_common_prefix_is_held_once(tokenizer):
    item = one(tokenizer, "ab:", ("xyz", "xyw"))
    assert len(item.prefix) == 5
    assert [len(span) for span in item.rest] == [1, 1]
    assert item.shared == 2  # "xy" belongs to both answers
    assert item.divisors == (3.0, 3.0)


def test_every_choice_keeps_a_token_of_its_own(tokenizer):
    item = one(tokenizer, "ab:", ("xy", "xyz"))
    assert [len(span) for span in item.rest] == [1, 2]


def test_text_mean_counts_all_but_the_first_token(tokenizer):
    item = one(tokenizer, "ab:", ("x", "yz"), "text_mean")
    assert item.prefix.counted.tolist() == [False, True, True]
    assert item.divisors == (3.0, 4.0)


def test_char_divides_by_characters_not_bytes(tokenizer):
    assert one(tokenizer, "q:", ("é", "où"), "char").divisors == (1.0, 2.0)


def test_texts_that_share_nothing_have_no_prefix(tokenizer):
    item = one(tokenizer, "", ("ab", "cd"))
    assert len(item.prefix) == 0
    assert [span.counted.tolist() for span in item.rest] == [[False, True]] * 2
    assert np.array_equal(item.rest[0].tokens, tokenizer("ab")["input_ids"])


def test_a_long_row_is_refused_by_its_place(tokenizer):
    with pytest.raises(InputError, match="f line 3 has 23 tokens and the base model reads 16"):
        one(tokenizer, "a" * 20, ("bcd", "e"), context=16)


def test_an_answer_without_tokens_is_refused(tokenizer):
    with pytest.raises(InputError, match="no token to score"):
        one(tokenizer, "ab", ("", "x"))

"""The learned tokens are exactly the completion's, whatever the row's form and the tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.errors import InputError
from train.examples import load_examples


@pytest.fixture
def load(config_of, write_rows, tokenizer):
    """A function from rows and settings to what is loaded of them."""

    def read(rows, tokenizer=tokenizer, limit=0, **settings):
        return load_examples(config_of(**settings), (write_rows(rows),), tokenizer, limit)

    return read


def learned_text(example, tokenizer):
    return tokenizer.decode(example.tokens[example.learned])


def test_the_completion_is_learned_and_the_prompt_is_not(load, tokenizer):
    (example,) = load([{"prompt": "Zwölf: ", "completion": "12 €"}]).examples
    assert learned_text(example, tokenizer) == "12 €<|im_end|>"
    assert tokenizer.decode(example.tokens) == "Zwölf: 12 €<|im_end|>"


def test_loss_on_all_learns_all_but_the_first_token(load):
    (example,) = load([{"prompt": "ab", "completion": "c"}], loss_on="all").examples
    assert example.learned.tolist() == [False, True, True, True]


def test_an_empty_prompt_leaves_only_the_first_token_out(load):
    (example,) = load([{"prompt": "", "completion": "cd"}]).examples
    assert example.learned.tolist() == [False, True, True]


def test_a_reply_is_learned_to_its_end(load, tokenizer):
    (example,) = load([{"prompt": "How?", "completion": "So."}], chat=True).examples
    assert learned_text(example, tokenizer) == "So.<|im_end|>\n"


@pytest.fixture(scope="module")
def merging():
    """A tokenizer with a token "bc", which puts a beginning-of-text token first."""
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "Ġ": 5}
    raw = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>"])
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


def test_a_token_across_the_boundary_is_learned(load, merging):
    (example,) = load([{"prompt": "ab", "completion": "ca"}], merging).examples
    assert example.tokens.tolist() == [0, 1, 4, 1]  # <s> a bc a
    assert example.learned.tolist() == [False, False, True, True]


def test_a_beginning_of_text_is_put_before_each_row_that_has_none(load, merging):
    rows = [{"prompt": "<s>ab", "completion": "a"}, {"prompt": "ab", "completion": "a"}]
    first, second = load(rows, merging).examples
    assert first.tokens.tolist() == second.tokens.tolist() == [0, 1, 2, 1]
    assert first.learned.tolist() == second.learned.tolist() == [False, False, False, True]


def test_long_rows_are_cut_and_counted(load):
    rows = [
        {"prompt": "p" * 4, "completion": "c"},  # 6 tokens with the end
        {"prompt": "p" * 4, "completion": "c" * 10},  # cut in its completion
        {"prompt": "p" * 20, "completion": "c"},  # cut before it
    ]
    loaded = load(rows, length=8)
    assert [len(e.tokens) for e in loaded.examples] == [6, 8]
    assert [int(e.learned.sum()) for e in loaded.examples] == [2, 4]
    assert (loaded.cut, loaded.lost) == (2, 1)


def test_nothing_left_to_learn_is_refused(load):
    with pytest.raises(InputError, match="beyond --length 8"):
        load([{"prompt": "p" * 20, "completion": "c"}], length=8)


def test_a_limit_draws_rows_by_the_seed_before_they_are_looked_at(load):
    rows = [{"prompt": "p", "completion": str(n)} for n in range(10)]
    places = [[e.place for e in load(rows, limit=4, seed=seed).examples] for seed in (0, 0, 1)]
    assert len(places[0]) == 4 and places[0] == places[1] != places[2]
    drawn = {int(place.rsplit(" ", 1)[1]) - 1 for place in places[0]}
    spoiled = [row if n in drawn else {"spoiled": n} for n, row in enumerate(rows)]
    assert [e.place for e in load(spoiled, limit=4).examples] == places[0]


TEXTS = [{"text": "abcdefg"}, {"text": "hijkl"}, {"text": "mnopqrs"}]  # 22 tokens with their ends


def test_next_tokens_learns_the_few_after_each_context(load, tokenizer):
    loaded = load(TEXTS, objective="next-tokens", context=5, predict=2)
    texts = [tokenizer.decode(e.tokens) for e in loaded.examples]
    assert texts == ["abcdefg", "<|im_end|>hijkl<|im_end|>", "mnopqrs"]
    assert all(e.learned.tolist() == [False] * 5 + [True] * 2 for e in loaded.examples)


def test_next_tokens_can_learn_every_token_as_the_released_code_does(load):
    loaded = load(TEXTS, objective="next-tokens", context=5, predict=2, loss_on="all")
    assert all(e.learned.tolist() == [False] + [True] * 6 for e in loaded.examples)


def test_a_language_model_learns_every_token_to_the_last(load):
    loaded = load(TEXTS, objective="language-model", length=8)
    assert [len(e.tokens) for e in loaded.examples] == [8, 8, 6]
    assert all(
        e.learned.tolist() == [False] + [True] * (len(e.tokens) - 1) for e in loaded.examples
    )


def test_every_segment_begins_with_the_beginning_of_text(load, merging):
    few = load(
        [{"text": "abcabcabc"}], merging, objective="next-tokens", context=3, predict=1
    ).examples
    assert [e.tokens.tolist() for e in few] == [[0, 1, 4, 1], [0, 4, 1, 4]]
    assert [e.learned.tolist() for e in few] == [[False, False, False, True]] * 2
    whole = load([{"text": "abcabcabc"}], merging, objective="language-model", length=5).examples
    assert [e.tokens.tolist() for e in whole] == [[0, 1, 4, 1, 4], [0, 1, 4]]
    assert all(e.learned.tolist() == [False] + [True] * (len(e.tokens) - 1) for e in whole)


def test_text_shorter_than_a_segment_is_refused(load):
    with pytest.raises(InputError, match="shorter than one segment"):
        load(TEXTS, objective="next-tokens", context=40, predict=2)


def test_a_limit_of_segments_starts_at_a_text_that_the_seed_draws(load, tokenizer):
    settings = {"objective": "next-tokens", "context": 3, "predict": 1}
    starts = set()
    for seed in range(8):
        examples = load(TEXTS, limit=5, seed=seed, **settings).examples
        assert len(examples) == 5
        starts.add(tokenizer.decode(examples[0].tokens))
        whole = "".join(tokenizer.decode(e.tokens) for e in examples)
        assert whole in 2 * "abcdefg<|im_end|>hijkl<|im_end|>mnopqrs<|im_end|>"
    assert starts == {"abcd", "hijk", "mnop"}


def test_masks_are_plain_arrays_of_their_tokens_length(load):
    for example in load([{"prompt": "p", "completion": "c" * 200}], length=16).examples:
        assert example.tokens.dtype == np.int32 and example.learned.dtype == bool
        assert example.tokens.shape == example.learned.shape == (16,)

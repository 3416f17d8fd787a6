"""Rows become one text or a pair with a label's number, and then tokens; a bad row is named."""

import pytest

from lora_jax.errors import InputError
from lora_jax.labelled import Form, Labelled, encode_texts, read
from lora_jax.rows import Row
from lora_jax.tokens import load_tokenizer

LABELS = ("no", "maybe", "yes")


@pytest.fixture(scope="session")
def tokenizer(classifier_folder):
    return load_tokenizer(classifier_folder)


def read_row(fields, **form):
    return read(Row(fields, "rows line 3"), Form(**form), LABELS)


def test_a_text_or_a_pair():
    assert read_row({"text": "a", "label": 1}) == Labelled(("a",), 1, "rows line 3")
    pair = read_row({"sentence1": "a", "sentence2": "b", "label": "yes"})
    assert pair.texts == ("a", "b") and pair.label == 2


def test_templates_and_a_field_for_the_label():
    fields = {"premise": "p", "hypothesis": "h", "text": "not read", "gold": "maybe"}
    one = read_row(fields, text="{premise} / {hypothesis}", label="gold")
    assert one.texts == ("p / h",) and one.label == 1
    two = read_row(fields, text="{premise}", second="{hypothesis}?", label="gold")
    assert two.texts == ("p", "h?")


@pytest.mark.parametrize(
    ("fields", "form", "message"),
    [
        ({"label": 0}, {}, r"needs \{text\}, \{sentence1, sentence2\} or templates .* has label"),
        ({"sentence1": "a", "label": 0}, {}, "needs {text}".replace("{", r"\{")),
        ({"text": 3, "label": 0}, {}, "needs"),
        ({"text": "a"}, {}, "'label' must be one of no, maybe, yes or its number from 0; got None"),
        ({"text": "a", "label": "perhaps"}, {}, "got 'perhaps'"),
        ({"text": "a", "label": 3}, {}, "got 3"),
        ({"text": "a", "label": -1}, {}, "got -1"),
        ({"text": "a", "label": 0.5}, {}, r"got 0\.5"),
        ({"q": "a", "label": 0}, {"text": "{p}"}, r"template '\{p\}' does not fit \('p'\)"),
        ({"q": None, "label": 0}, {"text": "{q}"}, "does not fit"),
        ({"q": "a", "label": 0}, {"text": "{q[0"}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(fields, form, message):
    with pytest.raises(InputError, match=f"rows line 3: .*{message}"):
        read_row(fields, **form)


def test_tokens_are_the_tokenizers_own_for_texts_and_pairs(tokenizer):
    rows = [Labelled((text,), 0, "") for text in ("ab", "")]
    ids, cut = encode_texts(tokenizer, rows, 10)
    assert ids == [tokenizer("ab")["input_ids"], [0, 2]] and cut == [False, False]
    pair, _ = encode_texts(tokenizer, [Labelled(("a", "bc"), 0, "")], 10)
    a, b, c = (tokenizer(x)["input_ids"][1] for x in "abc")
    assert pair == [[0, a, 2, 2, b, c, 2]]


def test_a_long_row_keeps_its_special_tokens(tokenizer):
    rows = [Labelled((text, "b"), 0, "") for text in ("a" * 5, "a" * 4, "a")]
    ids, cut = encode_texts(tokenizer, rows, 9)
    assert cut == [True, False, False]
    assert ids[0] == ids[1] and len(ids[0]) == 9 and ids[0][-1] == 2


def test_texts_and_pairs_do_not_mix(tokenizer):
    rows = [Labelled(("a",), 0, "one"), Labelled(("a", "b"), 0, "two")]
    with pytest.raises(InputError, match="two: some rows have one text and some a pair"):
        encode_texts(tokenizer, rows, 9)


def test_no_rows_are_no_tokens(tokenizer):
    assert encode_texts(tokenizer, [], 9) == ([], [])

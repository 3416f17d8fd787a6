"""Rows become a prompt and a completion, from each of the three forms; a bad row is named."""

import pytest

from lora_jax.errors import InputError
from train.pairs import pair
from train.rows import Row

ASKED = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def pair_of(config_of, tokenizer):
    """A function from fields and settings to a row's prompt and completion."""
    return lambda fields, **settings: pair(
        Row(fields, "t line 4"), config_of(**settings), tokenizer
    )


def test_prompt_and_completion(pair_of):
    assert pair_of({"prompt": "1+1=", "completion": 2}) == ("1+1=", "2<|im_end|>")


def test_templates_take_any_fields(pair_of):
    fields = {"q": "Sky?", "more": {"hint": "look"}, "a": "blue"}
    filled = pair_of(fields, prompt="{q} ({more[hint]})", completion=" {a}")
    assert filled == ("Sky? (look)", " blue<|im_end|>")


def test_answer_is_the_choice_that_the_label_names(pair_of):
    fields = {"choices": ["red", "blue"], "label": 1}
    assert pair_of(fields, prompt="Sky?", completion=" {answer}")[1] == " blue<|im_end|>"
    fields["answer"] = "grey"  # a field of that name comes first
    assert pair_of(fields, prompt="Sky?", completion=" {answer}")[1] == " grey<|im_end|>"


def test_messages_end_with_the_reply(pair_of):
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    assert pair_of({"messages": turns}) == (ASKED, "So.<|im_end|>\n")


def test_chat_puts_a_row_into_the_template(pair_of):
    row = {"prompt": "How?", "completion": " So."}
    assert pair_of(row, chat=True) == (ASKED, "So.<|im_end|>\n")


@pytest.mark.parametrize(
    ("fields", "settings", "told"),
    [
        ({"text": "a"}, {}, "needs {prompt, completion}"),
        ({}, {}, "no fields"),
        ({"prompt": "a", "completion": None}, {}, "completion must be text; got None"),
        ({"prompt": ["a"], "completion": "b"}, {}, "prompt must be text"),
        ({"q": "a"}, {"prompt": "{q}", "completion": "{r}"}, "needs a field 'r'; the row has q"),
        ({"q": None}, {"prompt": "{q}", "completion": "r"}, "needs a field 'q'"),
        ({"q": "a"}, {"prompt": "{q[0", "completion": "r"}, "does not fit"),
        ({"choices": ["a"], "label": 1}, {"prompt": "q", "completion": "{answer}"}, "label 1"),
        ({"choices": ["a"], "label": -1}, {"prompt": "q", "completion": "{answer}"}, "label -1"),
        ({"choices": ["a"], "label": "A"}, {"prompt": "q", "completion": "{answer}"}, "label 'A'"),
        ({"messages": []}, {}, "messages must be"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "end with the assistant's"),
        ({"messages": [{"role": "assistant"}]}, {}, "messages must be"),
        ({"messages": [{"role": "assistant", "content": None}]}, {}, "messages must be"),
    ],
)
def test_a_bad_row_is_named(pair_of, fields, settings, told):
    with pytest.raises(InputError, match="t line 4") as refusal:
        pair_of(fields, **settings)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | length }} {{ messages[-1]['content'] }}", "rewrites earlier turns"),
        (None, "no chat template"),
    ],
)
def test_a_chat_template_that_does_not_serve_is_told(
    pair_of, tokenizer, monkeypatch, template, told
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InputError, match=told):
        pair_of({"prompt": "How?", "completion": "So."}, chat=True)

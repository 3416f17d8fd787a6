"""Prompts read as their protocols have them."""

import pytest

from eval.prompts import frame, pose
from eval.tasks import Form, find
from lora_jax.errors import InputError
from lora_jax.rows import Row

ARC = {"question": "What is hot?", "choices": ["ice", "fire"], "label": 1}
BLANK = {"question": "Ann thanked Bob, for _ had helped.", "choices": ["Ann", "Bob"], "label": 1}


def posed(name, fields, style, tokenizer):
    task = find(name)
    return pose(task, task.form(style), Row(fields, "f line 1"), frame(style, tokenizer))


def test_plain_is_question_and_answer(tokenizer):
    found = posed("arc_easy", ARC, "plain", tokenizer)
    assert found.prompts == ("Question: What is hot?\nAnswer:",) * 2
    assert found.answers == (" ice", " fire")
    assert found.lengths == (3, 4) and found.label == 1


def test_chat_is_a_turn_and_its_reply_to_the_end(tokenizer):
    found = posed("arc_easy", ARC, "chat", tokenizer)
    opening = "<|im_start|>user\nWhat is hot?<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompts == (opening,) * 2
    assert found.answers == ("ice<|im_end|>\n", "fire<|im_end|>\n")


def test_winogrande_is_whole_or_partial_sentences(tokenizer):
    whole = posed("winogrande", BLANK, "plain", tokenizer)
    assert whole.prompts == ("", "")
    assert whole.answers[1] == "Ann thanked Bob, for Bob had helped."
    partial = posed("winogrande_partial", BLANK, "plain", tokenizer)
    assert partial.prompts[1] == "Ann thanked Bob, for Bob"
    assert partial.answers == (" had helped.",) * 2


def test_boolq_in_chat_is_true_or_false(tokenizer):
    fields = {"passage": "P.", "question": "is it", "choices": ["no", "yes"], "label": 1}
    plain, chat = (posed("boolq", fields, style, tokenizer) for style in ("plain", "chat"))
    assert plain.prompts[0] == "P.\nQuestion: is it?\nAnswer:"
    assert plain.answers[plain.label] == " yes"
    assert "[passage]P.[question]is it" in chat.prompts[0]
    assert chat.answers[chat.label].startswith("true")


def test_xnli_has_english_words_in_every_language(tokenizer):
    fields = {"premise": "Es regnet.", "hypothesis": "Es ist nass.", "label": 0}
    found = posed("xnli_de", fields, "chat", tokenizer)
    assert "[premise]Es regnet.[hypothesis]Es ist nass.[relationship]" in found.prompts[0]
    assert [a.partition("<")[0] for a in found.answers] == [
        "entailment",
        "neutral",
        "contradiction",
    ]


def test_groups_follow_the_row(tokenizer):
    fields = {"input": "i", "choices": ["(A)", "(B)"], "label": 0, "task": "snarks"}
    assert posed("bbh", fields, "plain", tokenizer).group == "snarks"


def test_a_label_may_be_words(tokenizer):
    assert posed("arc_easy", ARC | {"label": "fire"}, "plain", tokenizer).label == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": 2}, r"f line 1: 'label' must be one of \['ice', 'fire'\].*got 2"),
        ({"label": "steam"}, "got 'steam'"),
        ({"choices": ["ice"]}, "'choices' must list at least two texts"),
        ({"choices": ["ice", ""]}, "at least two texts"),
        ({"choices": "ice"}, "at least two texts"),
    ],
)
def test_bad_rows_are_refused(tokenizer, change, message):
    with pytest.raises(InputError, match=message):
        posed("arc_easy", ARC | change, "plain", tokenizer)


@pytest.mark.parametrize("field", ["{question:d}", "{question.colour}", "{question:{width}}"])
def test_a_template_that_does_not_fit_is_refused(tokenizer, field):
    with pytest.raises(InputError, match=r"f line 1: the template .* question") as refused:
        pose(find("arc_easy"), Form(field), Row(ARC, "f line 1"), frame("plain", tokenizer))
    assert repr(field) in str(refused.value)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.syntax import ExpressionError, names, parse, refuse_unknown


def test_names_are_the_inputs_and_not_the_functions_or_the_words():
    text = "arrow(gks(lib, mean(en, fr)), my.task_2, top_k=2, mixing=factors) - 0.5*toxic"
    assert names(text) == {"lib", "en", "fr", "my.task_2", "toxic"}


@pytest.mark.parametrize(
    "text",
    ["a", "-a", "a-b", "2*(a + b)/3", ".5*a", "1e-3*a", "mean(a)", "a\n - b", "- -a", "f(k=-1)"],
)
def test_well_formed_texts_are_parsed(text):
    assert parse(text)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("a b", 3, "unexpected 'b'"),
        ("a $ b", 3, r"unexpected '\$'"),
        ("a +", 4, "ends too early"),
        ("(a", 3, "ends too early"),
        ("", 1, "ends too early"),
        ("a)", 2, r"unexpected '\)'"),
        ("2a", 2, r"unexpected 'a'; write 2\*a"),
        ("a - 0.4bee", 8, r"write 0.4\*bee"),
        ("f(k=1+1)", 6, r"unexpected '\+'"),
        ("f(k=-1-1)", 7, "unexpected '-'"),
        ("f(k=-a)", 6, "unexpected 'a'"),
        ("f(k=-)", 6, r"unexpected '\)'"),
        ("import os; a", 8, "unexpected"),
    ],
)
def test_a_slip_is_pointed_at(text, column, words):
    with pytest.raises(ExpressionError, match=words) as caught:
        parse(text)
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith(f"column {column}: ")
    assert line == f"  {text}" and caret == " " * (column + 1) + "^"


def test_an_unknown_name_is_pointed_at_on_its_own_line():
    with pytest.raises(ExpressionError) as caught:
        refuse_unknown("chat\n - 0.4*toxik", ["chat", "toxic"])
    assert str(caught.value) == (
        "column 8: unknown name 'toxik'; the inputs are chat, toxic\n   - 0.4*toxik\n         ^"
    )


@given(st.text("ab1.+-*/(),= \n", max_size=30))
def test_any_text_is_parsed_or_refused(text):
    try:
        parse(text)
    except ExpressionError as error:
        assert str(error).endswith("^")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.recipe.yaml_text import dump, parse
from lora_jax.errors import InputError


def test_values_and_the_places_of_keys_and_values():
    value, source, problems = parse("a:\n  b: [1, x]\n'c': |\n  long\n", "file")
    assert value == {"a": {"b": [1, "x"]}, "c": "long\n"} and not problems
    assert source.keys["a", "b"] == (2, 3) and source.values["a", "b"] == (2, 6)
    assert source.values["a", "b", 1] == (2, 10) and source.keys["c",] == (3, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("1e-3", 1e-3),
        ("-.5", -0.5),
        ("07", 7),
        ("'7'", "7"),
        ("true", True),
        ("~", None),
        (".inf", ".inf"),
    ],
)
def test_words_stay_words_and_numbers_are_numbers(text, value):
    found = parse(f"x: {text}", "file")[0]["x"]
    assert found == value and type(found) is type(value)


def test_an_alias_is_its_value_and_a_merge_is_no_magic():
    assert parse("a: &w [1, 2]\nb: *w", "file")[0] == {"a": [1, 2], "b": [1, 2]}
    assert parse("a: {<<: {b: 1}}", "file")[0] == {"a": {"<<": {"b": 1}}}


BOMB = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 10,000 values; a recipe is small: check its aliases"),
        ("a: &x [*x]", "line 1, column 4: too many tables in tables"),
        ("[" * 1200, "nested too deeply"),
        ("a: [1, 2", "line 1, column 9: not YAML: expected ',' or ']'"),
        ("a:\n\t- b", "line 2, column 1: not YAML: .* indent with spaces"),
        ("a: {*.q_proj: 1}", 'column 6: not YAML: .* put quotes around a pattern: "\\*.q_proj"'),
        ("a: *math", "undefined alias 'math'; in YAML a plain \\* begins an alias"),
        ("a: 1\n---\nb: 2", "line 2, column 1: not YAML: but found another document"),
        ("a: \x01", "not YAML: unacceptable character"),
    ],
    ids=range(9),
)
def test_what_is_no_yaml_or_grows_is_refused(text, words):
    with pytest.raises(InputError, match=f"^file: .*{words}"):
        parse(text, "file")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!mine", "!!binary"])
def test_a_tag_is_told_and_nothing_is_made_of_it(tag):
    value, _, problems = parse(f"a: {tag} [echo]", "file")
    assert value == {"a": ["echo"]}
    assert "has no place in a recipe" in problems[0].message and problems[0].place == (1, 4)


def test_a_key_that_is_there_twice_or_no_word_is_told():
    value, _, problems = parse("a: 1\nb: 2\na: 3\n? [x]\n: 4", "file")
    assert value == {"a": 1, "b": 2}
    assert [p.place for p in problems] == [(3, 1), (4, 3)]
    assert "is there twice, on line 1 first" in problems[0].message


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
plain = st.recursive(
    st.booleans() | st.integers(-9999, 9999) | st.floats(-1e6, 1e6, width=32) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, plain, max_size=4))
def test_what_is_dumped_is_parsed_again(value):
    assert parse(dump(value), "file")[0] == (value or {})


@pytest.mark.parametrize("word", ["1e5", "08", "no", "TRUE", "null", "*", "a: b", "x # y", "- 1"])
def test_words_that_look_like_something_else_are_quoted(word):
    assert parse(dump({word: [word]}), "file")[0] == {word: [word]}

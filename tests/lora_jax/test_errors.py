import pytest

from lora_jax.errors import InputError, nearest, refuse_all


def test_no_problem_is_no_error():
    refuse_all([], "here")


def test_every_problem_is_told_at_once_with_its_place():
    with pytest.raises(InputError, match=r"^config\.json: a is wrong; b is wrong$"):
        refuse_all(["a is wrong", "b is wrong"], "config.json")


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(InputError) as caught:
        refuse_all([f"p{n}" for n in range(11)], "here")
    assert str(caught.value).endswith("p7; and 3 more")


def test_a_bad_input_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_a_remedy_is_the_nearest_name_or_all_there_are():
    assert nearest("tiez", ["mean", "ties"]) == "did you mean ties?"
    assert nearest("xyz", iter(["mean", "ties"])) == "there are mean, ties"
    assert nearest("xyz", []) == "there are none"

import pytest

from compose.recipe import Expression, Method, Recipe, check
from compose.recipe.check import notes
from compose.recipe.read import parsed_text
from lora_jax.errors import InputError


def simple(root, out, **changes):
    """A recipe of one step, with fields changed."""
    fields = {
        "inputs": {"math": str(root / "math")},
        "steps": {"x": Expression("2*math")},
        "outputs": {str(out): "x"},
    }
    return Recipe(**fields | changes)


def test_a_recipe_in_order_passes_and_leaves_nothing(root, tmp_path):
    check(simple(root, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_value_is_checked_as_a_file_is(root, tmp_path):
    steps = {"x": Method("tiez", ("math",)), "y": Method("ties", ("math",), ("1",), rank=0)}
    with pytest.raises(InputError) as caught:
        check(simple(root, tmp_path / "out", steps=steps, space="f"))
    told = str(caught.value)
    assert told.startswith("recipe: ") and "line" not in told
    for words in ("steps.x: unknown method 'tiez'; did you mean ties?", "steps.y.weights.0: '1'"):
        assert words in told
    assert "rank must be at least 1; got 0" in told and "space 'f' is none of" in told


def test_folders_that_hold_no_module_are_told_together(root, tmp_path):
    (tmp_path / "empty").mkdir()
    inputs = {"a": str(tmp_path / "gone"), "b": str(tmp_path / "empty"), "c": "unused"}
    recipe = simple(root, tmp_path / "out", inputs=inputs, steps={"x": Expression("a + b")})
    with pytest.raises(
        InputError, match=r"2 things.*\n  inputs\.a: .*gone is not a folder.*\n  inputs\.b: .*empty"
    ):
        check(recipe)


def test_an_input_on_the_hub_is_not_fetched_yet(root, tmp_path, hub):
    fetched = hub(root / "math")
    check(simple(root, tmp_path / "out", inputs={"math": "hf://ann/math"}))
    assert not fetched
    with pytest.raises(InputError, match=r"inputs\.math: 'hf://ann' is no address on the hub"):
        check(simple(root, tmp_path / "out", inputs={"math": "hf://ann"}))


def test_an_output_that_exists_is_refused_unless_it_may_be_replaced(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").touch()
    with pytest.raises(InputError, match="out exists; choose another folder or pass --overwrite"):
        check(simple(root, out))
    check(simple(root, out), overwrite=True)
    (out / "adapter_config.json").rename(out / "mine")
    with pytest.raises(InputError, match="it is not ours to overwrite"):
        check(simple(root, out), overwrite=True)


@pytest.mark.parametrize("place", ["math", "math/deeper", ""])
def test_an_output_never_touches_an_input(root, place):
    with pytest.raises(InputError, match=r"holds or lies in the input math; choose another"):
        check(simple(root, root / place), overwrite=True)


@pytest.mark.parametrize("other", ["out", "out/deeper", "./out/../out", "."])
def test_outputs_never_touch_each_other(root, tmp_path, other):
    outputs = {str(tmp_path / "out"): "x", f"{tmp_path}/{other}/": "x"}
    with pytest.raises(InputError, match="is, holds or lies in the output"):
        check(simple(root, "", outputs=outputs))


def test_what_has_no_effect_is_noted():
    text = "inputs: {a: A, b: B}\nsteps:\n  x: a\n  idle: b\noutputs: {out: x}\n"
    recipe, problems = parsed_text(text, "file")
    assert not problems and notes(recipe) == [
        "no output needs the step idle (line 4); it is left out",
        "no output needs the input b (line 1); it is left out",
    ]

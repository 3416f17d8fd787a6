import inspect

import pytest

from compose.functions import FUNCTIONS
from compose.merging.methods import METHODS as MERGING
from compose.recipe.methods import METHODS, misfit, options


def test_every_function_and_method_is_there():
    assert METHODS.keys() == FUNCTIONS.keys() | set(MERGING)
    assert {"ties", "dare_ties", "knots", "arrow", "fisher"} <= METHODS.keys()


def test_members_and_weights():
    assert (METHODS["gks"].least, METHODS["gks"].most) == (2, 2)
    assert (METHODS["analogy"].least, METHODS["mean"].most) == (3, None)
    weighted = {name for name, form in METHODS.items() if form.weighted}
    assert weighted == set(MERGING) - FUNCTIONS.keys() | {"mean"}


def test_options_are_the_functions_own():
    assert options("analogy", {}).keys() == {"weight"}
    assert options("ties", {}).keys() == {"density", "majority"}
    assert options("dare_linear", {}).keys() == {"density", "seed"}
    assert "space" not in options("mean", {})


def test_a_method_within_brings_its_options():
    assert {"inner", "density", "majority"} <= options("knots", {}).keys()
    assert "majority" not in options("knots", {"inner": "linear"})
    assert "gamma" in options("knots", {"inner": "breadcrumbs"})
    assert "gamma" not in options("knots", {"inner": 3})


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        (float, 1, ""),
        (float, True, "a number"),
        (float, float("inf"), "a number"),
        (int | None, None, ""),
        (int | None, 1.5, "a whole number"),
        (float | str, "sqrt(d)", ""),
        (float | str, (1,), "a number or a word"),
        (bool, True, ""),
        (bool, 1, "true or false"),
        (str, None, "a word"),
    ],
)
def test_what_an_option_may_be(annotation, value, wanted):
    parameter = inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    assert misfit(parameter, value) == wanted

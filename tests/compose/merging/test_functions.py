"""The merging methods in expressions."""

import inspect

import jax
import numpy as np
import pytest

from compose.expression import resolve, resolve_with_losses
from compose.library import Library
from compose.merging.functions import MERGING
from compose.merging.merge import merge
from compose.merging.methods import METHODS
from compose.syntax import ExpressionError


@pytest.fixture(scope="module")
def inputs(lora):
    """Two adapters and a library of two."""
    library = Library(("x", "y"), (lora(5), lora(6)))
    return {"a": lora(0), "b": lora(1), "lib": library}


def test_every_method_is_a_function():
    assert set(MERGING) == set(METHODS)
    for name, function in MERGING.items():
        assert function.__name__ == name and function.__doc__
        assert "space" in inspect.signature(function).parameters


def test_a_call_is_the_merge_and_tells_what_it_lost(inputs):
    text = "ties(a, lib, density=0.3, weights=[1, 0.5, -2], rank=2)"
    found, lost = resolve_with_losses(f"0.5*{text} - b", inputs)
    members = [inputs["a"], *inputs["lib"].adapters]
    wanted, errors = merge(members, "ties", weights=[1, 0.5, -2], rank=2, density=0.3)
    jax.tree.map(np.testing.assert_array_equal, lost, {text: errors})
    ranks = {path: module.a.shape[-1] for path, module in found.items()}
    assert ranks == {path: module.a.shape[-1] + 3 for path, module in wanted.items()}


def test_words_truths_seeds_and_the_space_arrive(inputs):
    adapters = [inputs["a"], inputs["b"]]
    cases = {
        "knots(a, b, inner=dare_ties, scaled=false, density=0.5, seed=3)": merge(
            adapters, "knots", inner="dare_ties", scaled=False, density=0.5, seed=3
        ),
        "ties(a, b, majority=frequency)": merge(adapters, "ties", majority="frequency"),
    }
    for text, (wanted, _) in cases.items():
        jax.tree.map(np.testing.assert_array_equal, resolve(text, inputs), wanted)
    wanted, _ = merge(adapters, "ties", space="factor", density=0.5)
    found = resolve("ties(a, b, density=0.5)", inputs, space="factor")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_fisher_information_is_given_as_modules(inputs):
    squares = {name: jax.tree.map(jax.numpy.square, inputs[name]) for name in ("a", "b")}
    known = inputs | {f"f{name}": square for name, square in squares.items()}
    adapters, fishers = [inputs["a"], inputs["b"]], list(squares.values())
    wanted, _ = merge(adapters, "fisher", space="factor", weights=[1, 2], fishers=fishers)
    text = "fisher(a, b, weights=[1, 2], fishers=[fa, fb])"
    jax.tree.map(np.testing.assert_array_equal, resolve(text, known, space="factor"), wanted)
    with pytest.raises(ExpressionError, match="weighs factors; add --space factor"):
        resolve(text, known)
    for slip, words in (
        ("[a, b]", "negative entries"),
        ("fa", r"such as \[a, b\]"),
        ("[1]", "module"),
    ):
        with pytest.raises(ExpressionError, match=words):
            resolve(f"fisher(a, b, fishers={slip})", known, space="factor")


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("ties(a, b, weights=2)", 20, r"in square brackets is wanted here, such as \[0.3"),
        ("ties(a, b, weights=[1])", 1, "2 modules need as many weights; got 1"),
        ("ties(a, density=[1, 2])", 17, "a number is wanted here"),
        ("ties(a, majority=[1])", 18, "majority is a word, such as total"),
        ("ties(a, dens=1)", 9, "did you mean density"),
        ("ties(a, density=2)", 17, "density must be above 0 and at most 1; got 2"),
        ("knots(a, inner=tiez)", 16, r"unknown inner method 'tiez'; did you mean ties\?"),
        ("tiez(a)", 1, r"unknown function 'tiez'; did you mean ties\?"),
        ("knots(a, b, scaled=1)", 20, "true or false is wanted here"),
        ("ties(a, rank=1.5)", 14, "rank must be a whole number"),
        ("negate(module=[1])", 15, "give it by position"),
        ("ties(a, weights=[])", 18, "unexpected"),
    ],
)
def test_a_slip_is_pointed_at(inputs, text, column, words):
    with pytest.raises(ExpressionError, match=words) as caught:
        resolve(text, inputs)
    assert str(caught.value).startswith(f"column {column}: ")

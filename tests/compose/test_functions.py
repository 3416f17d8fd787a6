import inspect

import jax
import numpy as np
import pytest

from compose import arithmetic
from compose.expression import resolve
from compose.functions import FUNCTIONS
from compose.genknowsub import centred, project_out, without
from compose.library import Library, Routing

spaces = pytest.mark.parametrize("space", ["delta", "factor"])


@pytest.fixture(scope="module")
def inputs(lora):
    """Three adapters and a library of two."""
    library = Library(("x", "y"), (lora(5), lora(6)))
    return {"a": lora(0), "b": lora(1), "c": lora(2), "lib": library}


@spaces
def test_each_function_is_the_papers_in_the_space(inputs, space):
    a, b, c = (inputs[name] for name in "abc")
    cases = {
        "mean(a, b, c)": arithmetic.average([a, b, c], space=space),
        "mean(lib, a)": arithmetic.average([*inputs["lib"].adapters, a], space=space),
        "negate(a, 0.7)": arithmetic.negate(a, 0.7),
        "analogy(a, b, c, 0.9)": arithmetic.analogy(a, b, c, 0.9, space=space),
        "detox(a, b, 0.3)": arithmetic.detox(a, b, 0.3, space=space),
        "gks(a, b)": without(a, b, space=space),
        "gks(a, b, strength=0.5)": without(a, b, strength=0.5, space=space),
        "gks(a, b, strength=-1)": without(a, b, strength=-1, space=space),
        "gks(a, b, strength=--.5)": without(a, b, strength=0.5, space=space),
        "project_out(a, b, 0.5)": project_out(a, b, strength=0.5, space=space),
        "centred(lib)": centred(inputs["lib"], space=space),
    }
    for text, want in cases.items():
        found = resolve(text, inputs, space=space)
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_library_is_routed_only_when_asked(inputs):
    assert resolve("library(lib, a)", inputs).routing is None
    found = resolve("arrow(lib, a, top_k=2, temperature=0.5)", inputs)
    assert found.routing == Routing(2, 0.5, "outputs")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_is_and_takes_the_space(name):
    assert FUNCTIONS[name].__name__ == name and FUNCTIONS[name].__doc__
    assert "space" in inspect.signature(FUNCTIONS[name]).parameters

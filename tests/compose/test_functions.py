import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import arithmetic, controls
from compose.expression import resolve
from compose.functions import FUNCTIONS
from compose.genknowsub import centred, project_out, without
from compose.library import Library, Routing
from compose.recipe import evaluate
from compose.recipe.read import parsed_text
from compose.routing.given import oracle
from lora_jax.errors import InputError
from lora_jax.project import project

UP = "mlp.up_proj"
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


@spaces
def test_two_libraries_of_the_same_names_meet_member_by_member(inputs, space):
    one = inputs["lib"].adapters
    purified = [without(m, inputs["a"], space=space) for m in one]
    cases = {
        "lib + lib": [arithmetic.weighted_sum([m, m], [1.0, 1.0], space=space) for m in one],
        "lib - gks(lib, a)": [
            arithmetic.weighted_sum([m, n], [1.0, -1.0], space=space)
            for m, n in zip(one, purified, strict=True)
        ],
        "rescaled(lib, gks(lib, a))": [
            controls.rescaled(m, n) for m, n in zip(one, purified, strict=True)
        ],
        "analogy(lib, lib, gks(lib, a), 0.9)": [
            arithmetic.analogy(m, m, n, 0.9, space=space)
            for m, n in zip(one, purified, strict=True)
        ],
    }
    for text, want in cases.items():
        found = resolve(text, inputs, space=space)
        assert found.names == ("x", "y")
        jax.tree.map(np.testing.assert_array_equal, found.adapters, tuple(want))


def test_rescaled_plain_arrow_can_be_written(inputs):
    found = resolve("arrow(rescaled(lib, gks(lib, a)), top_k=1)", inputs)
    assert found.names == ("x", "y") and found.routing == Routing(1)


def test_a_member_is_the_module_of_its_name_and_what_an_oracle_routes_to(inputs):
    library = inputs["lib"]
    found = resolve("member(arrow(lib), name=y)", inputs)
    assert found is library.adapters[1]
    x, kernel = jax.random.normal(jax.random.key(0), (3, 5)), jnp.zeros((5, 9))
    first = [jax.tree.map(lambda leaf: leaf[0], m[UP]) for m in (oracle(library, "y"), found)]
    routed, alone = (project(x, kernel, None, module) for module in first)
    np.testing.assert_allclose(routed, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("member(lib, name=z)", "no module 'z' in this library; there are x, y"),
        ("member(library(a, lib), name=xx)", "did you mean x\\?"),
        ("member(a, name=x)", "member takes a library; this is one module"),
        ("member(lib, name=2)", "name is a word"),
        ("member(lib)", r"member\(library, \*, name\): missing .* 'name'"),
    ],
)
def test_no_such_member_is_told_with_those_there_are(inputs, text, words):
    with pytest.raises(InputError, match=words) as caught:
        resolve(text, inputs)
    assert "class" not in str(caught.value)


def test_a_recipe_has_members_too(inputs):
    text = "inputs: {lib: l}\nsteps: {one: {member: lib, name: x}}\noutputs: {out: one}\n"
    recipe, problems = parsed_text(text, "r.yaml")
    assert not problems and evaluate(recipe, inputs)["one"] is inputs["lib"].adapters[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_is_and_takes_the_space(name):
    assert FUNCTIONS[name].__name__ == name and FUNCTIONS[name].__doc__
    assert "space" in inspect.signature(FUNCTIONS[name]).parameters

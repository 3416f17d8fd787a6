import jax.numpy as jnp
import pytest

from compose.recipe import Expression, Method, Recipe, recipe_text
from compose.recipe.read import parsed_text

RECIPES = [
    Recipe({"a": "A"}, {"x": Expression("a")}, {"out": "x"}),
    Recipe(
        {"no": "1e5", "b.c": "hf://user/repo@v1", "d": "~/odd: #name"},
        {
            "x": Method("ties", ("no", "d"), ((0, 1), {"*.q": 0.5, "*": (1, 0)}), "delta", 4),
            "y": Method("dare_ties", ("x",), (1e-5,), options={"density": 0.5, "seed": 3}),
            "z": Expression("x - 0.4*y", rank=2),
            "w": Method("arrow", ("x", "z"), options={"top_k": 1, "mixing": "factors"}),
        },
        {"out/ü": "z", "*": "w"},
        base="12",
        space="delta",
    ),
    Recipe({"a": "A"}, {"x": Expression("-a", "factor")}, {"out": "x"}, space="factor"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_written_is_read_again(recipe):
    found, problems = parsed_text(recipe_text(recipe), "file")
    assert found == recipe and not problems
    assert recipe_text(found) == recipe_text(recipe)


def test_weights_that_were_learned_are_written_as_numbers():
    step = Method("linear", ("a", "a"), (jnp.array(0.5), jnp.array([0.25, 1.0])))
    text = recipe_text(Recipe({"a": "A"}, {"x": step}, {"out": "x"}))
    assert "weights: [0.5, [0.25, 1.0]]" in text

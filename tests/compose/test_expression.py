import jax
import numpy as np
import pytest

from compose import arithmetic
from compose.expression import evaluate, resolve
from compose.library import Library, Routing
from lora_jax.errors import InputError
from lora_jax.modules import Experts

UP = "mlp.up_proj"
spaces = pytest.mark.parametrize("space", ["delta", "factor"])


@pytest.fixture(scope="module")
def inputs(lora):
    """Four adapters and a library of three."""
    x, y, z, a, b = (lora(seed, paths=(UP,)) for seed in range(5))
    library = Library(("x", "y", "z"), (x, y, z))
    return {"a": a, "b": b, "c": lora(5, rank=2, paths=(UP,)), "base": {}, "lib": library}


def equal(x, y) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


@spaces
def test_a_name_is_its_input_and_the_base_adds_nothing(inputs, space):
    assert evaluate("a", inputs, space=space) is inputs["a"]
    equal(evaluate("a + base", inputs, space=space), inputs["a"])


@spaces
def test_operators_are_the_arithmetic_of_the_space(inputs, space):
    a, b, c = (inputs[name] for name in "abc")
    equal(evaluate("-a", inputs, space=space), arithmetic.negate(a))
    equal(evaluate("a - b", inputs, space=space), arithmetic.subtract(a, b, space=space))
    equal(evaluate("-0.5*a", inputs, space=space), arithmetic.scale(a, -0.5, space=space))
    equal(evaluate("a/4", inputs, space=space), arithmetic.scale(a, 0.25, space=space))
    equal(
        evaluate("0.25*a - b*(1 - 0.5) + c", inputs, space=space),
        arithmetic.weighted_sum([a, b, c], [0.25, -0.5, 1], space=space),
    )


def test_brackets_and_precedence(inputs, dense):
    one = dense(evaluate("2*(a - (b - c))", inputs))[UP]
    a, b, c = (dense(inputs[name])[UP] for name in "abc")
    np.testing.assert_allclose(one, 2 * (a - b + c), atol=1e-4)


@spaces
def test_a_long_sum_is_no_deep_one(inputs, space):
    total = evaluate(" + ".join(["base"] * 3000 + ["a"]), inputs, space=space)
    equal(total, inputs["a"])


def test_arithmetic_on_a_library_acts_on_its_members(inputs, dense):
    found = evaluate("lib - mean(lib)", inputs)
    assert found.names == ("x", "y", "z")
    total = sum(dense(member)[UP] for member in found.adapters)
    np.testing.assert_allclose(total, 0, atol=1e-4)


def test_arrow_gives_a_routed_adapter_and_resolve_the_library_it_comes_from(inputs):
    text = "arrow(gks(lib, a), b, top_k=2, mixing=factors)"
    routed = evaluate(text, inputs, space="factor")
    assert isinstance(routed[UP], Experts)
    assert routed[UP].a.shape[1] == 4 and routed[UP].mixing == "factors"
    library = resolve(text, inputs, space="factor")
    assert library.names == ("x", "y", "z", "b") and library.routing == Routing(2, 1.0, "factors")


def test_a_library_without_routing_stays_a_library(inputs):
    assert evaluate("lib", inputs) is inputs["lib"]
    settled = {**inputs, "lib": inputs["lib"].replace(routing=Routing(1))}
    assert isinstance(evaluate("gks(lib, a)", settled, space="factor")[UP], Experts)


def test_rank_recompresses_modules_and_members(inputs):
    assert evaluate("a - b", inputs, rank=2)[UP].a.shape[-1] == 2
    assert evaluate("arrow(lib - a)", inputs, rank=2)[UP].a.shape[-1] == 2
    assert evaluate("a", inputs, rank=8)[UP] is inputs["a"][UP]


def test_rank_belongs_to_delta_space(inputs):
    with pytest.raises(InputError, match="factor space keeps its ranks"):
        evaluate("a - b", inputs, space="factor", rank=4)
    with pytest.raises(InputError, match="rank must be at least 1; got 0"):
        evaluate("a - b", inputs, rank=0)


def test_what_is_too_deep_is_refused(inputs):
    with pytest.raises(InputError, match="nested too deeply"):
        evaluate("-" * 5000 + "a", inputs)


def test_an_expression_is_a_pure_function_of_its_inputs(inputs):
    pair = {name: inputs[name] for name in "ab"}
    gradient = jax.jit(jax.grad(lambda m: (evaluate("a - 0.4*b", m)[UP].b ** 2).sum()))(pair)
    np.testing.assert_allclose(gradient["a"][UP].b, 2 * inputs["a"][UP].b, rtol=1e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.library import Library
from compose.merging.merge import merge
from compose.recipe import Expression, Method, Recipe, evaluate, plan, read_recipe
from compose.recipe.methods import METHODS, options
from compose.recipe.read import parsed_text
from compose.recipe.value import used
from compose.recipe.write import recipe_text
from lora_jax.errors import InputError
from lora_jax.modules import IA3, describe


def test_the_plan_is_of_what_is_made(written, modules):
    recipe = read_recipe(written())
    planned, found = plan(recipe, modules), evaluate(recipe, modules)
    assert planned.keys() == found.keys() == {"both", "clean", "routed"}
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(planned))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), dict(v)) for v in (planned, found)]
    assert shapes[0] == shapes[1]
    assert isinstance(planned["routed"], Library) and planned["routed"].routing.top_k == 1
    assert describe(planned["clean"]) == describe(dict(sorted(found["clean"].items())))


def test_inputs_may_be_shapes_alone(written, modules):
    shapes = jax.eval_shape(lambda: modules)
    assert describe(plan(read_recipe(written()), shapes)["both"]).startswith("LoRA of rank 4 on")


def test_steps_that_their_inputs_cannot_go_through_are_told_with_their_lines(tmp_path, modules):
    (tmp_path / "recipe.yaml").write_text("""
inputs: {math: a, code: b, scale: c}
steps:
  mixed: math + scale
  late: mixed - code
  over: {ties: [math, code], weights: [1, {"k_proj": 1, "*": 2}]}
  wide: {arrow: [math, code], top_k: 3}
  fine: math
  idle: scale + math
outputs: {o: late, p: over, q: wide, r: fine}
""")
    inputs = modules | {"scale": {"self_attn.q_proj": IA3(jnp.zeros((2, 32)))}}
    with pytest.raises(InputError) as caught:
        plan(read_recipe(tmp_path / "recipe.yaml"), inputs)
    first, *told = str(caught.value).split("\n  line ")
    assert first.endswith("recipe.yaml: 3 things are wrong:")
    assert [part.split(",")[0][-1] for part in told] == ["4", "6", "7"]
    assert "q_proj: cannot combine IA3" in told[0]
    assert "column 39: steps.over.weights: weights for k_proj, which fit no proj" in told[1]
    assert "top_k must lie between 1 and the library's 2 modules" in told[2]


def test_fisher_information_comes_from_inputs_and_steps(modules):
    square = jax.tree.map(jnp.square, modules["math"])
    step = Method("fisher", ("math", "code"), (1, 2), "factor", options={"fishers": ("f", "all")})
    steps = {"all": Expression("f"), "x": step}
    recipe = Recipe({"math": "", "code": "", "f": ""}, steps, {"o": "x"})
    assert used(step) == ["math", "code", "f", "all"]
    inputs = modules | {"f": square}
    adapters = [modules["math"], modules["code"]]
    wanted, _ = merge(adapters, "fisher", weights=[1, 2], space="factor", fishers=[square, square])
    found = evaluate(recipe, inputs)["x"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, wanted)
    assert plan(recipe, inputs).keys() == {"all", "x"}
    with pytest.raises(
        InputError, match=r"steps\.x: fishers\[0\] has negative .* --fisher --start"
    ):
        evaluate(recipe, inputs | {"f": modules["code"]})
    assert parsed_text(recipe_text(recipe), "again")[0].steps == steps


def test_a_wrong_call_is_pointed_at(tmp_path, modules):
    text = "inputs: {math: a}\nsteps: {x: 2*math + mean(3)}\noutputs: {o: x}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=r"line 2, column 26: steps\.x: a module is wanted here"):
        plan(read_recipe(tmp_path / "recipe.yaml"), modules)


def test_a_step_may_be_differentiated_and_compiled(modules):
    def total(weight):
        step = Method("linear", ("math", "code"), (weight, {"q_proj": weight, "*": (0, 1)}))
        recipe = Recipe({"math": "", "code": ""}, {"x": step}, {"o": "x"})
        leaves = jax.tree.leaves(evaluate(recipe, modules)["x"])
        return sum((leaf**2).sum() for leaf in leaves)

    slope = (total(0.5 + 1e-2) - total(0.5 - 1e-2)) / 2e-2
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.5), slope, rtol=1e-2)


def test_expressions_and_methods_meet(modules):
    recipe = Recipe(
        {"math": "", "code": ""},
        {"sum": Expression("math + code"), "same": Method("linear", ("math", "code"))},
        {"o": "sum", "p": "same"},
    )
    found = evaluate(recipe, modules)
    for path, module in found["sum"].items():
        other = found["same"][path]
        dense = [m.scale * m.a @ m.b for m in (module, other)]
        np.testing.assert_allclose(*dense, atol=1e-5)


def test_inputs_that_are_not_there_are_named(written, modules):
    recipe, some = read_recipe(written()), {"math": modules["math"]}
    for function in (plan, evaluate):
        with pytest.raises(InputError, match="no module for the input code, wiki; give one by"):
            function(recipe, some)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_planned(lora, name):
    count = METHODS[name].most or 2
    given = {n: 0.5 for n, option in options(name, {}).items() if option.default is option.empty}
    space = "delta"
    inputs = {n: lora(seed) for seed, n in enumerate("abc")}
    if name == "fisher":
        given, space = {"fishers": tuple("bc")}, "factor"
    if name == "member":
        given, inputs["a"] = {"name": "two"}, Library(("one", "two"), (lora(0), lora(1)))
    step = Method(name, tuple("abc"[:count]), space=space, options=given)
    recipe = Recipe(dict.fromkeys("abc", ""), {"x": step}, {"o": "x"})
    assert jax.tree.leaves(plan(recipe, inputs)["x"])

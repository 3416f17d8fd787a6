"""A diagnosis, against the same numbers from dense matrices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import controls, diagnose_report
from compose.arithmetic import subtract
from compose.diagnose import (
    alignment,
    diagnose,
    diagnose_recipe,
    effective_rank,
    initial_share,
    prototype_cosines,
    prototype_pairs,
)
from compose.diagnose_figure import draw
from compose.diagnose_words import words
from compose.library import Library
from compose.recipe import Expression, Method, Recipe
from lora_jax.errors import InputError
from lora_jax.modules import init_lora

Q = "self_attn.q_proj"


def flat(dense, adapter) -> np.ndarray:
    return np.concatenate([np.ravel(delta) for delta in dense(adapter).values()])


def test_norms_cosines_and_gaps_are_those_of_the_dense_deltas(lora, dense):
    x, y = lora(0), lora(1)
    found = diagnose("x - 0.5*y", {"x": x, "y": y}, space="factor")
    a, b = flat(dense, x), flat(dense, y)
    halves = [{p: m.replace(a=(u * m.a), b=(v * m.b)) for p, m in adapter.items()}
              for adapter, u, v in ((x, 1, 1), (y, 0.5, -0.5))]  # fmt: skip
    summed = {p: m.replace(a=m.a + halves[1][p].a, b=m.b + halves[1][p].b) for p, m in x.items()}
    result, alone = flat(dense, summed), a + flat(dense, halves[1])
    exact = a - 0.5 * b
    size = np.linalg.norm
    assert found.modules["result"] == ("result",) and found.results["result"].inputs == ("x", "y")
    np.testing.assert_allclose(
        list(found.norms.values()), [size(a), size(b), size(result)], rtol=1e-5
    )
    np.testing.assert_allclose(found.cosines[0, 1], a @ b / size(a) / size(b), atol=1e-5)
    np.testing.assert_allclose(np.diag(found.cosines), 1, rtol=1e-5)
    np.testing.assert_allclose(
        found.interaction["result"], size(result - alone) / size(result), rtol=1e-4
    )
    np.testing.assert_allclose(found.gap["result"], size(result - exact) / size(exact), rtol=1e-4)


def test_a_sum_of_deltas_has_no_interaction(lora):
    found = diagnose("mean(x, y)", {"x": lora(0), "y": lora(1)})
    assert found.interaction["result"] < 1e-5 < found.gap["result"]


def test_the_effective_rank_counts_equal_directions():
    eye = jnp.eye(6)[None, :, :4]
    modules = {Q: init_lora(jax.random.key(0), {Q: (1, 6, 6)}, targets=[Q], rank=4, alpha=4.0)[Q]}
    even = {Q: modules[Q].replace(a=eye, b=jnp.swapaxes(eye, 1, 2))}
    assert effective_rank(even) == pytest.approx(4, rel=1e-5)
    one = {Q: even[Q].replace(b=even[Q].b * jnp.array([1.0, 0, 0, 0])[:, None])}
    assert effective_rank(one) == pytest.approx(1, rel=1e-5)
    assert effective_rank(modules) == 0  # b is zero


def test_subtraction_of_a_module_of_one_seed_takes_its_first_draw_away():
    shapes = {Q: (2, 40, 30)}
    first = init_lora(jax.random.key(5), shapes, targets=[Q], rank=4, alpha=4.0)

    def trained(seed, size):
        noise = jax.random.normal(jax.random.key(seed), first[Q].a.shape)
        return {Q: first[Q].replace(a=first[Q].a + size * noise, b=first[Q].b + 0.1 * seed)}

    inputs = {"task": trained(1, 0.02), "general": trained(2, 0.005)}
    initial = {name: controls.untrained(module, 5) for name, module in inputs.items()}
    found = diagnose("gks(task, general)", inputs, space="factor", initial=initial)
    assert found.initial["task"] > 0.9 and found.initial["result"] < 0.3
    told = " ".join(words(found))
    assert "first draw" in told and "compare with untrained()" in told and "cross terms" in told
    assert initial_share(inputs["task"], {}) == 0


def test_libraries_are_measured_member_by_member(lora):
    library = Library(("m", "n"), (lora(0), lora(1)))
    found = diagnose("gks(lib, g)", {"lib": library, "g": lora(2)}, space="delta")
    assert found.modules["result"] == ("result.m", "result.n")
    assert set(found.norms) == {"lib.m", "lib.n", "g", "result.m", "result.n"}
    units = [np.linalg.svd(m[Q].a @ m[Q].b)[0][..., 0] for m in library.adapters]
    only = Library(library.names, tuple({Q: m[Q]} for m in library.adapters))
    wanted = np.abs(np.sum(units[0] * units[1], axis=-1)).mean()
    assert alignment(only) == pytest.approx(wanted, rel=1e-4)
    assert "The prototypes of lib's modules have a mean cosine" in " ".join(words(found))


def test_prototypes_are_compared_pair_by_pair_before_and_after(lora):
    inputs = {"x": lora(0), "y": lora(1), "g": lora(2)}
    found = diagnose("arrow(gks(x, g), gks(y, g), top_k=2)", inputs)
    made = [subtract(inputs[name], inputs["g"], space="delta") for name in "xy"]
    (pair,) = prototype_pairs(found)["result"]
    assert pair.before == pytest.approx(prototype_cosines([inputs["x"], inputs["y"]])[0, 1])
    assert pair.after == pytest.approx(prototype_cosines(made)[0, 1], rel=1e-4)
    assert abs(pair.after - pair.before) > 0.01
    assert f"{pair.after:.2f}, against {pair.before:.2f} before" in " ".join(words(found))


def test_a_recipe_is_diagnosed_as_its_expressions_are(lora):
    inputs = {"x": lora(0), "y": lora(1), "z": lora(2)}
    weights = (1, {"q_proj": 0.5, "*": 2})
    steps = {"both": Method("linear", ("x", "y"), weights), "less": Expression("both - 0.5*z")}
    recipe = Recipe(dict.fromkeys(inputs, ""), steps, {"one": "both", "two": "less"})
    found = diagnose_recipe(recipe, inputs)
    assert found.results["both"].inputs == ("x", "y")
    assert found.results["less"].inputs == ("x", "y", "z")
    for path in inputs["y"]:
        share = 0.5 if path.endswith("q_proj") else 2.0
        inputs["y"][path] = inputs["y"][path].replace(b=share * inputs["y"][path].b)
    want = diagnose("x + y - 0.5*z", inputs)
    assert found.norms["less"] == pytest.approx(want.norms["result"], rel=1e-5)
    assert found.gap["less"] > 0 and found.interaction["less"] < 1e-5
    assert any(told.startswith("less is both - 0.5*z, in delta space") for told in words(found))


def test_fisher_information_is_no_module(lora):
    inputs = {"x": lora(0), "y": lora(1)}
    squares = {f"f{n}": jax.tree.map(jnp.square, module) for n, module in inputs.items()}
    found = diagnose("fisher(x, y, fishers=[fx, fy])", inputs | squares, space="factor")
    assert set(found.norms) == {"x", "y", "result"} and found.interaction["result"] > 0


def test_it_is_a_table_json_and_a_figure(lora, tmp_path):
    found = diagnose("x + y", {"x": lora(0), "y": lora(1)})
    assert diagnose_report.modules(found).row_count == 3
    read = json.loads(json.dumps(diagnose_report.as_json(found)))
    assert read["norms"]["x"] == found.norms["x"] and read["words"]
    draw(found, tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_an_input_called_result_is_refused(lora):
    with pytest.raises(InputError, match="an input is called result"):
        diagnose("2*result", {"result": lora(0)})

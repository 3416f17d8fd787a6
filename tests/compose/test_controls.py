import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose import controls, lowrank
from compose.arithmetic import factor_sum
from compose.expression import evaluate
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, init_lora

SHAPES = {"self_attn.q_proj": (2, 7, 6), "mlp.up_proj": (2, 5, 9)}


def sizes(adapter):
    return {path: np.asarray(lowrank.norm(module)) for path, module in adapter.items()}


def test_an_untrained_module_is_the_first_state_of_a_run():
    first = init_lora(jax.random.key(7), SHAPES, targets=list(SHAPES), rank=3, alpha=12.0)
    trained = {path: m.replace(a=m.a + 0.1, b=m.b + 0.2) for path, m in first.items()}
    found = controls.untrained(trained, 7)
    assert all(found[path].scale == m.scale for path, m in first.items())
    jax.tree.map(np.testing.assert_array_equal, found, first)


def test_subtracting_it_factor_by_factor_leaves_what_was_learned(lora):
    first = init_lora(jax.random.key(7), SHAPES, targets=list(SHAPES), rank=3, alpha=6.0)
    trained = {path: m.replace(b=m.b + 0.2) for path, m in first.items()}
    left = factor_sum([trained, controls.untrained(trained, 7)], [1.0, -1.0], sign="ab")
    assert all(not np.any(m.a) and np.any(m.b) for m in left.values())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_a_random_module_is_as_large_and_another(lora, seed):
    module = lora(seed)
    drawn, again = (controls.random_like(module, seed) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    for path, wanted in sizes(module).items():
        np.testing.assert_allclose(sizes(drawn)[path], wanted, rtol=1e-5)
        cosine = lowrank.inner(module[path], drawn[path]) / wanted**2
        assert np.all(np.abs(cosine) < 0.9)
    other = controls.random_like(module, seed + 1)
    assert not np.allclose(other["mlp.up_proj"].a, drawn["mlp.up_proj"].a)


def test_a_rescaled_module_has_the_others_size_and_its_own_direction(lora):
    x, y = lora(0), lora(1, rank=2, scale=0.5)
    found = controls.rescaled(x, y)
    for path, wanted in sizes(y).items():
        np.testing.assert_allclose(sizes(found)[path], wanted, rtol=1e-5)
        cosine = lowrank.inner(found[path], x[path]) / (wanted * sizes(x)[path])
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    alone = controls.rescaled(x, {"mlp.up_proj": y["mlp.up_proj"]})
    assert alone["self_attn.q_proj"] is x["self_attn.q_proj"]


def test_ia3_has_its_controls(ia3):
    x, y = ia3(0), ia3(1)
    drawn, sized = controls.random_like(x, 3), controls.rescaled(x, y)
    length = lambda adapter: np.linalg.norm(adapter["mlp.up_proj"].offset, axis=-1)  # noqa: E731
    np.testing.assert_allclose(length(drawn), length(x), rtol=1e-5)
    np.testing.assert_allclose(length(sized), length(y), rtol=1e-5)
    assert not np.any(controls.untrained(x, 0)["mlp.up_proj"].offset)


def test_a_module_of_nothing_stays_nothing(lora):
    nothing = {path: m.replace(b=jnp.zeros_like(m.b)) for path, m in lora(0).items()}
    assert not np.any(sizes(controls.random_like(nothing, 0))["mlp.up_proj"])
    assert not np.any(sizes(controls.rescaled(nothing, lora(1)))["mlp.up_proj"])


def test_expressions_have_them(lora):
    inputs = {"x": lora(0), "y": lora(1)}
    for text, wanted in {
        "untrained(x, seed=3)": controls.untrained(inputs["x"], 3),
        "random(x, seed=4)": controls.random_like(inputs["x"], 4),
        "rescaled(x, y)": controls.rescaled(inputs["x"], inputs["y"]),
    }.items():
        jax.tree.map(np.testing.assert_array_equal, evaluate(text, inputs), wanted)


def test_what_has_no_control_is_refused(lora):
    dora = {p: DoRA(m.a, m.b, jnp.ones((2, m.b.shape[-1]))) for p, m in lora(0).items()}
    with pytest.raises(InputError, match="no untrained DoRA"):
        controls.untrained(dora, 0)
    with pytest.raises(InputError, match="no random DoRA"):
        controls.random_like(dora, 0)
    with pytest.raises(InputError, match="a DoRA has no size"):
        controls.rescaled(dora, dora)

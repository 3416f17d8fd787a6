import jax
import numpy as np
import pytest

from compose.genknowsub import genknowsub, without
from compose.library import Library
from lora_jax.errors import InputError

UP = "mlp.up_proj"


def test_factor_space_subtracts_the_factor_mean_from_both_factors(lora):
    tasks = Library(("x", "y"), (lora(0), lora(1)))
    generals = [lora(2), lora(3), lora(4)]
    found = genknowsub(tasks, generals, space="factor", strength=0.5)
    assert found.names == ("x", "y")
    for task, clean in zip(tasks.adapters, found.adapters, strict=True):
        for leaf in ("a", "b"):
            mean = sum(getattr(g[UP], leaf) for g in generals) / 3
            want = getattr(task[UP], leaf) - 0.5 * mean
            np.testing.assert_allclose(getattr(clean[UP], leaf), want, atol=1e-6)


def test_delta_space_subtracts_the_mean_delta_at_the_summed_rank(lora, dense):
    tasks = Library(("x",), (lora(0, rank=2),))
    generals = [lora(1, rank=2), lora(2, rank=3)]
    (found,) = genknowsub(tasks, generals, space="delta").adapters
    assert found[UP].a.shape[-1] == 2 + 2 + 3
    mean = (dense(generals[0])[UP] + dense(generals[1])[UP]) / 2
    np.testing.assert_allclose(dense(found)[UP], dense(tasks.adapters[0])[UP] - mean, atol=1e-5)


def test_the_spaces_differ_by_the_cross_terms(lora, dense):
    task, general = lora(0), lora(1)
    found = dense(without(task, general, space="factor"))[UP]
    x, g = task[UP], general[UP]
    cross = x.scale * (2 * (g.a @ g.b) - x.a @ g.b - g.a @ x.b)
    exact = dense(without(task, general, space="delta"))[UP]
    np.testing.assert_allclose(found, exact + cross, atol=1e-4)


def test_no_strength_is_no_change_bit_for_bit(lora):
    task = lora(0)
    found = without(task, lora(1), space="factor", strength=0.0)
    jax.tree.map(np.testing.assert_array_equal, found, task)


def test_a_general_module_of_more_projections_is_refused_in_factor_space(lora, dense):
    task, general = lora(0, paths=(UP,)), lora(1)
    with pytest.raises(InputError, match=r"general module changes self_attn\.q_proj"):
        without(task, general, space="factor")
    found = dense(without(task, general, space="delta"))["self_attn.q_proj"]
    np.testing.assert_allclose(found, -dense(general)["self_attn.q_proj"], rtol=1e-6)

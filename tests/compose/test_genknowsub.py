import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import geometry
from compose.genknowsub import centred, genknowsub, project_out, without
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


def projector(x):
    """Onto the columns of x."""
    q, _ = np.linalg.qr(np.asarray(x, np.float64))
    return q @ q.mT


spaces = pytest.mark.parametrize("space", ["delta", "factor"])


@spaces
def test_projecting_out_takes_both_of_the_general_modules_subspaces(lora, dense, space):
    task, general = lora(0), lora(1, rank=2, scale=0.5)
    found = project_out(task, general, space=space)
    g = general[UP]
    inputs, outputs = projector(g.a), projector(g.b.mT)
    want = (np.eye(5) - inputs) @ dense(task)[UP] @ (np.eye(9) - outputs)
    np.testing.assert_allclose(dense(found)[UP], want, atol=1e-5)
    assert np.abs(dense(found)[UP] @ dense(general)[UP].mT).max() < 1e-4
    assert found[UP].a.shape == task[UP].a.shape
    part = project_out(task, general, space=space, strength=np.array([0.5, 0.0]))[UP]
    np.testing.assert_allclose(part.a[0], (task[UP].a + found[UP].a)[0] / 2, atol=1e-6)
    np.testing.assert_array_equal(part.b[1], task[UP].b[1])


def test_an_untrained_module_has_a_subspace_in_factor_space_alone(lora, dense):
    task = lora(0)
    untrained = {path: m.replace(b=jnp.zeros_like(m.b)) for path, m in lora(1).items()}
    delta, factor = (project_out(task, untrained, space=s) for s in ("delta", "factor"))
    jax.tree.map(np.testing.assert_array_equal, delta, task)
    want = (np.eye(5) - projector(untrained[UP].a)) @ dense(task)[UP]
    np.testing.assert_allclose(dense(factor)[UP], want, atol=1e-5)


def test_projecting_out_leaves_a_projection_that_the_general_module_leaves(lora, ia3):
    task, general = lora(0), lora(1, paths=(UP,))
    found = project_out(task, general, space="delta")
    assert found["self_attn.q_proj"] is task["self_attn.q_proj"]
    with pytest.raises(InputError, match=r"mlp\.up_proj: only LoRA"):
        project_out(ia3(0), ia3(1), space="delta")


@spaces
def test_a_centred_library_has_its_mean_taken_out(lora, space):
    tasks = Library(("x", "y"), (lora(0), lora(1)))
    found = centred(tasks, space=space)
    want = genknowsub(tasks, [lora(0), lora(1)], space=space)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    # x - m and y - m, with m halfway, are opposite; so are both factors, which cancels.
    sign = -1 if space == "delta" else 1
    assert abs(geometry.cosine(*found.adapters) - sign) < 1e-5

import jax
import numpy as np
import pytest

from compose.merging.merge import merge
from compose.recipe import Expression, Method
from compose.recipe.steps import made

Q, UP = "self_attn.q_proj", "mlp.up_proj"
CASES = [
    ("linear", "delta", {}),
    ("linear", "factor", {}),
    ("ties_mergekit", "delta", {"density": 0.5}),
    ("ties_mergekit", "factor", {"density": 0.5}),
    ("svc", "delta", {}),
]


@pytest.mark.parametrize(("method", "space", "options"), CASES)
def test_weights_of_a_layer_and_projection_are_that_layers_merge(
    modules, dense, method, space, options
):
    shares = ((1, 0.5), {"q_proj": (2, 1), "*": 0.25})
    step = Method(method, ("math", "code"), shares, space, options=options)
    whole = dense(made(step, modules, "delta")[0])
    plain = {(Q, 1): (0.5, 1), (UP, 0): (1, 0.25)}
    for (path, layer), weights in plain.items():
        members = [
            {path: jax.tree.map(lambda x, n=layer: x[n : n + 1], modules[name][path])}
            for name in ("math", "code")
        ]
        one, _ = merge(members, method, weights=weights, space=space, **options)
        np.testing.assert_allclose(whole[path][layer], dense(one)[path][0], atol=1e-5)


def test_what_a_step_lost_is_told_by_member(modules):
    value, lost = made(Method("svd", ("math", "code"), rank=2), modules, "delta")
    assert lost.keys() == {""} and lost[""][Q].shape == (2,) and value[Q].a.shape[-1] == 2
    _, lost = made(Expression("library(math, code)", rank=1), modules, "delta")
    assert lost.keys() == {"math", "code"}
    assert made(Expression("math - code"), modules, "delta")[1] == {}

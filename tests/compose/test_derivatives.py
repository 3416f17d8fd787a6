"""Which functions of whole modules run under jit and have gradients: the table of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import controls, genknowsub
from compose.library import Library
from compose.merging.merge import merge
from compose.merging.methods import METHODS
from compose.merging.svc import calibrated

UP = "mlp.up_proj"
OPTIONS = {"dare_ties": {"density": 0.5}, "della": {"density": 0.5}}
FUNCTIONS = {
    "calibrated": lambda x, y: calibrated(x, [x, y]),
    "project_out": lambda x, y: genknowsub.project_out(x, y, space="delta"),
    "project_out in factors": lambda x, y: genknowsub.project_out(x, y, space="factor"),
    "centred": lambda x, y: genknowsub.centred(Library(("x", "y"), (x, y)), space="delta"),
    "without": lambda x, y: genknowsub.without(x, y, space="factor"),
    "rescaled": controls.rescaled,
}


def total(value) -> jax.Array:
    """A number that every delta in a module or library has to do with."""
    adapters = value.adapters if isinstance(value, Library) else (value,)
    random = np.random.default_rng(3)
    parts = []
    for adapter in adapters:
        module = adapter[UP]
        left, right = (random.standard_normal(n) for n in (module.a.shape[-2], module.b.shape[-1]))
        parts.append(module.scale * jnp.sum((left @ module.a) * (module.b @ right)))
    return sum(parts[1:], parts[0])


def slopes(function, adapters) -> tuple[float, float]:
    """The slope along a random step by the gradient, and by a small step each way."""
    random = np.random.default_rng(4)
    steps = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), adapters)
    moved = jax.jit(
        lambda t: function(*jax.tree.map(lambda x, dx: x + t * dx, tuple(adapters), tuple(steps)))
    )
    found = jax.jit(jax.grad(moved))(0.0)
    return float(found), (float(moved(1e-3)) - float(moved(-1e-3))) / 2e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_modules_differentiates_in_them(lora, name):
    adapters = [lora(seed, rank=2, paths=(UP,)) for seed in (0, 1)]
    found, want = slopes(lambda x, y: total(FUNCTIONS[name](x, y)), adapters)
    assert abs(found - want) < 0.02 * max(abs(want), 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_merge_is_traced_and_differentiated_in_its_weights(lora, method):
    adapters = [lora(seed, rank=2, paths=(UP,)) for seed in (0, 1)]
    options = dict(OPTIONS.get(method, {}))
    if method == "fisher":
        squares = [jax.tree.map(jnp.square, {UP: m[UP].replace(scale=1.0)}) for m in adapters]
        options["fishers"] = squares

    def merged(weight):
        return total(merge(adapters, method, weights=[weight, 1.0], rank=4, **options)[0])

    value = merged(0.7)
    found, slope = jax.jit(jax.value_and_grad(merged))(0.7)
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-3)
    assert np.isfinite(slope)

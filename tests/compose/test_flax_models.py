"""What `compose` makes of modules of a user's own Flax model is a module of it too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.arithmetic import negate, weighted_sum
from compose.arrow import route_library
from compose.genknowsub import genknowsub
from compose.library import Library, stack
from lora_jax import flax_linen
from lora_jax.modules import init_lora

X = jax.random.normal(jax.random.key(0), (4, 8))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="up")(jnp.tanh(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


VARIABLES = Model().init(jax.random.key(1), X)
KERNELS = flax_linen.kernels(Model(), VARIABLES, X)


@pytest.fixture(scope="module")
def adapters():
    shapes = flax_linen.shapes(Model(), VARIABLES, X)
    made = []
    for seed in range(3):
        key = jax.random.key(seed)
        new = init_lora(key, shapes, targets=["all-linear"], rank=2, alpha=2 + seed)
        made.append({p: m.replace(b=jax.random.normal(key, m.b.shape) / 4) for p, m in new.items()})
    return made


@jax.jit
def run(adapter):
    return flax_linen.apply(Model(), VARIABLES, adapter, X)


def with_deltas(*pairs):
    """The model's output with Σ weight · scale · a·b in its kernels, written out."""
    new = {
        p: k + sum(w * a[p].scale * a[p].a @ a[p].b for w, a in pairs) for p, k in KERNELS.items()
    }
    params = jax.tree.map(jnp.copy, VARIABLES["params"])
    params["layers"]["up"]["kernel"], params["head"]["kernel"] = new["layers.up"], new["head"]
    return Model().apply({"params": params}, X)


def test_sums_and_negation_add_what_the_modules_do(adapters):
    a, b, _ = adapters
    total = weighted_sum([a, b], [1, -0.5], space="delta")
    np.testing.assert_allclose(run(total), with_deltas((1, a), (-0.5, b)), atol=1e-4)
    np.testing.assert_allclose(run(negate(a)), with_deltas((-1, a)), atol=1e-4)


def test_genknowsub_takes_the_general_module_out_of_each(adapters):
    a, b, general = adapters
    pure = genknowsub(Library(("a", "b"), (a, b)), [general], space="delta")
    for task, member in zip((a, b), pure.adapters, strict=True):
        np.testing.assert_allclose(run(member), with_deltas((1, task), (-1, general)), atol=1e-4)


def test_arrow_over_a_library_of_one_is_that_module_and_of_many_none_of_them(adapters):
    one = route_library(Library(("a",), tuple(adapters[:1])), top_k=1)
    np.testing.assert_allclose(run(one), run(adapters[0]), atol=1e-4)
    many = run(route_library(Library(("a", "b", "c"), tuple(adapters)), top_k=2))
    assert min(abs(many - run(adapter)).max() for adapter in adapters) > 1e-3


def test_a_stacked_library_runs_in_one_program(adapters):
    together = jax.vmap(run)(stack(adapters))
    np.testing.assert_allclose(together, [run(adapter) for adapter in adapters], atol=1e-4)

"""What holds for every method of the table: laws, and what is never formed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest

from compose.merging.spectral import SPECTRAL, VECTORS
from lora_jax.modules import LoRA

WEIGHTS = jnp.array([0.7, 1.3, 2.0])
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
methods = pytest.mark.parametrize("name", SPECTRAL)


@cache
def program(name):
    """A method, compiled once for all tests, for two sets of modules and weights."""
    return quick(lambda *both: jax.lax.map(lambda one: SPECTRAL[name](*one), both))


def pair(name, first, second):
    """The results of two sets of modules and weights."""
    found = program(name)(*jax.tree.map(lambda *x: jnp.stack(x), first, second))
    return [jax.tree.map(lambda x, n=n: x[n], found) for n in (0, 1)]


@methods
def test_one_module_at_weight_one_is_itself(members, deltas, far, name):
    one = members(count=1)
    assert far(deltas(quick(SPECTRAL[name])(one, jnp.ones(1))), deltas(one)[0]) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
@methods
def test_the_order_of_the_modules_does_not_matter(members, ragged, deltas, far, name, padded):
    m = ragged if padded else members()
    order = jnp.array([0, 2, 1] if name == "ext_sub" else [2, 0, 1])  # an expert comes first
    turned = jax.tree.map(lambda x: x[order], m)
    plain, found = pair(name, (m, WEIGHTS), (turned, WEIGHTS[order]))
    assert far(deltas(found), deltas(plain)) < 1e-4


@methods
def test_modules_three_times_as_large_give_three_times_as_much(members, deltas, far, name):
    m = members()
    plain, found = pair(name, (m, WEIGHTS), (m.replace(b=3 * m.b), WEIGHTS))
    assert far(deltas(found), 3 * deltas(plain)) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsv", {}),
        ("wudi", {"damping": 0.1}),
        ("knots", {"inner": "linear"}),
        ("core_space", {"inner": "linear"}),
    ],
)
def test_it_is_linear_in_the_weights(members, deltas, far, name, options):
    m, other = members(), jnp.array([-1.0, 0.5, 0.25])
    of = quick(lambda weights: SPECTRAL[name](m, weights, **options))
    both = deltas(of(2 * WEIGHTS - other))
    assert far(both, 2 * deltas(of(WEIGHTS)) - deltas(of(other))) < 1e-4


def test_a_module_at_weight_zero_has_no_say_in_wudi(members, deltas, far):
    m = members()
    found = SPECTRAL["wudi"](m, WEIGHTS.at[1].set(0))
    without = SPECTRAL["wudi"](jax.tree.map(lambda x: x[::2], m), WEIGHTS[::2])
    assert far(deltas(found), deltas(without)) < 1e-5


@methods
def test_no_matrix_of_input_by_output_size_is_formed(name):
    wide = LoRA(jnp.ones((3, 300, 2)), jnp.ones((3, 2, 500)))
    text = str(jax.make_jaxpr(SPECTRAL[name])(wide, WEIGHTS))
    assert "500]" in text
    assert not any(size in text for size in ("300,500]", "500,300]", "300,300]", "500,500]"))


@methods
def test_results_have_the_type_of_the_modules(members, deltas, far, name):
    m = jax.tree.map(lambda x: x.astype(jnp.bfloat16), members())
    found = quick(SPECTRAL[name])(m, WEIGHTS)
    assert found.a.dtype == found.b.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), m)
    assert far(deltas(found), deltas(quick(SPECTRAL[name])(wide, WEIGHTS))) < 0.02


@pytest.mark.parametrize("name", VECTORS)
def test_one_vector_at_weight_one_is_itself(far, name):
    x = jnp.arange(1.0, 6)[None]
    assert far(VECTORS[name](x, jnp.ones(1)), x[0]) < 1e-6

"""The spectral methods on whole adapters of unequal ranks and scales, with projections missing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.merge import merge
from compose.merging.spectral import SPECTRAL, VECTORS
from lora_jax.errors import InputError
from lora_jax.modules import LoRA

UP = "mlp.up_proj"
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
methods = pytest.mark.parametrize("name", SPECTRAL)


WEIGHTS = [0.7, 1.3, 2.0]


@pytest.fixture(scope="module")
def ragged(lora):
    """Adapters of ranks 1 and 2 and scales 2 and -0.5, and one that leaves the projection alone."""
    return [lora(0, rank=1, paths=(UP,)), {}, lora(1, rank=2, scale=-0.5, paths=(UP,))]


def at_layer(adapters, layer):
    """The adapters at one layer, as one LoRA of rank 2 and scale 1 with zeros for what is not."""
    a, b = np.zeros((3, 5, 2)), np.zeros((3, 2, 9))
    for n, module in enumerate(adapter.get(UP) for adapter in adapters):
        if module is not None:
            rank = module.a.shape[-1]
            a[n, :, :rank], b[n, :rank] = module.a[layer], module.scale * module.b[layer]
    return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


@methods
def test_each_layer_is_merged_by_itself(ragged, dense, deltas, far, name):
    found, errors = merge(ragged, name, weights=WEIGHTS)
    assert dense(found)[UP].shape == (2, 5, 9)
    np.testing.assert_allclose(errors[UP], 0, atol=1e-6)
    want = deltas(quick(SPECTRAL[name])(at_layer(ragged, 1), jnp.array(WEIGHTS)))
    assert far(dense(found)[UP][1], want) < 1e-5


def test_a_lower_rank_is_the_nearest_and_tells_its_error(ragged, dense, far):
    whole = dense(merge(ragged, "wudi", weights=WEIGHTS)[0])[UP][0]
    found, errors = merge(ragged, "wudi", weights=WEIGHTS, rank=1)
    lost, s = far(dense(found)[UP][0], whole), np.linalg.svd(whole, compute_uv=False)
    assert found[UP].a.shape[-1] == 1
    np.testing.assert_allclose(lost, np.sqrt(1 - s[0] ** 2 / np.sum(s**2)), atol=1e-4)
    np.testing.assert_allclose(errors[UP][0], lost, atol=1e-4)


def test_one_adapter_at_weight_one_is_itself(lora, dense, far):
    one = lora(3, paths=(UP,))
    assert far(dense(merge([one], "iso_c")[0])[UP], dense(one)[UP]) < 1e-5


@methods
def test_ia3_is_merged_where_there_is_a_vector_form(ia3, name):
    adapters = [ia3(0), ia3(1)]
    if name not in VECTORS:
        with pytest.raises(InputError, match=rf"mlp\.up_proj: IA3, which {name} has no form"):
            merge(adapters, name)
        return
    found, errors = merge(adapters, name)
    offsets = jnp.stack([adapter[UP].offset[1] for adapter in adapters])
    np.testing.assert_allclose(found[UP].offset[1], VECTORS[name](offsets, jnp.ones(2)), rtol=1e-5)
    assert not errors


def test_factor_space_is_refused(lora):
    with pytest.raises(InputError, match="knots works on deltas"):
        merge([lora(0)], "knots", space="factor")


def test_a_spectral_inner_method_draws_alike_from_one_seed(ragged, dense):
    draw = {"inner": "dare_linear", "density": 0.5}
    first, same, other = (
        dense(merge(ragged, "core_space", seed=seed, **draw)[0])[UP] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_the_walk_of_wudi_is_merged_on_dense_deltas_factors_and_vectors(lora, ia3, dense, far):
    adapters, walk = [lora(seed, paths=(UP,)) for seed in (0, 1)], {"steps": 20, "rate": 1e-2}
    found, errors = merge(adapters, "wudi_adam", **walk)
    assert found[UP].a.shape[-1] == 5 and np.all(errors[UP] < 1e-5)  # rank 6 holds a 5 x 9 matrix
    factors, _ = merge(adapters, "wudi_adam", space="factor", **walk)
    assert factors[UP].a.shape == adapters[0][UP].a.shape
    offset = merge([ia3(0), ia3(1)], "wudi_adam")[0][UP].offset
    np.testing.assert_allclose(offset, (ia3(0)[UP].offset + ia3(1)[UP].offset) / 2, rtol=1e-6)

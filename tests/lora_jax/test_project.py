import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.modules import IA3, Experts, LoRA
from lora_jax.project import Dropout, dropped, project

KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (2, 5, 8))
KERNEL = jax.random.normal(KEYS[1], (8, 6))
BIAS = jax.random.normal(KEYS[2], (6,))


def lora(rank=3, scale=0.5):
    a, b = jax.random.normal(KEYS[3], (8, rank)), jax.random.normal(KEYS[4], (rank, 6))
    return LoRA(a, b, scale)


def test_no_module_is_the_base_projection():
    assert (project(X, KERNEL, BIAS) == X @ KERNEL + BIAS).all()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_adds_its_scaled_product_to_the_kernel(rank):
    m = lora(rank)
    want = X @ (KERNEL + m.scale * m.a @ m.b) + BIAS
    np.testing.assert_allclose(project(X, KERNEL, BIAS, m), want, atol=1e-5)


def test_lora_with_b_zero_is_the_identity():
    m = lora().replace(b=jnp.zeros((3, 6)))
    assert (project(X, KERNEL, BIAS, m) == project(X, KERNEL, BIAS)).all()


def test_padding_the_rank_with_zeros_changes_nothing():
    m = lora()
    padded = LoRA(jnp.pad(m.a, ((0, 0), (0, 2))), jnp.pad(m.b, ((0, 2), (0, 0))), m.scale)
    np.testing.assert_allclose(project(X, KERNEL, None, padded), project(X, KERNEL, None, m), 1e-5)


def test_ia3_rescales_the_output_with_its_bias_or_the_input():
    out, inp = jax.random.normal(KEYS[5], (6,)), jax.random.normal(KEYS[5], (8,))
    y = project(X, KERNEL, BIAS, IA3(out))
    np.testing.assert_allclose(y, (X @ KERNEL + BIAS) * (1 + out), atol=1e-5)
    y = project(X, KERNEL, BIAS, IA3(inp, on="input"))
    np.testing.assert_allclose(y, (X * (1 + inp)) @ KERNEL + BIAS, atol=1e-5)


@pytest.mark.parametrize("module", [IA3(jnp.zeros(6)), IA3(jnp.zeros(8), on="input")])
def test_ia3_with_offset_zero_is_the_identity(module):
    assert (project(X, KERNEL, BIAS, module) == project(X, KERNEL, BIAS)).all()


def test_a_single_expert_is_its_lora():
    m = lora(scale=1.0)
    expert = Experts(m.a[None], m.b[None], prototypes=jnp.ones((1, 8)), top_k=1)
    np.testing.assert_allclose(project(X, KERNEL, BIAS, expert), project(X, KERNEL, BIAS, m), 1e-4)


def test_an_unknown_module_is_a_bug_not_the_base():
    with pytest.raises(TypeError, match="no way to apply a float"):
        project(X, KERNEL, None, 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("module", [None, lora(), IA3(jnp.ones(6)), IA3(jnp.ones(8), on="input")])
def test_the_output_has_the_input_type_though_modules_are_float32(dtype, module):
    y = project(X.astype(dtype), KERNEL.astype(dtype), None, module)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float32), project(X, KERNEL, None, module), rtol=0.05, atol=0.2
    )


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    ones = jnp.ones((400, 250))
    y = dropped(ones, Dropout(KEYS[0], 0.25))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.01
    assert abs(y.mean() - 1) < 0.01


def test_no_dropout_at_rate_zero_or_in_inference():
    assert dropped(X, None) is X
    assert dropped(X, Dropout(KEYS[0], 0.0)) is X


def test_dropout_falls_on_the_module_path_only():
    m, drop = lora(), Dropout(KEYS[0], 0.5)
    with_base = project(X, KERNEL, BIAS, m, drop)
    alone = project(X, jnp.zeros_like(KERNEL), None, m, drop)
    np.testing.assert_allclose(with_base, X @ KERNEL + BIAS + alone, atol=1e-5)
    assert not np.allclose(with_base, project(X, KERNEL, BIAS, m))
    assert (project(X, KERNEL, BIAS, None, drop) == project(X, KERNEL, BIAS)).all()

"""Kernels in few bits: by their definition, within their bounds, and under every module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lora_jax import checkpoint, models, quantize
from lora_jax.decoder import with_saved
from lora_jax.errors import InputError
from lora_jax.merge import merge
from lora_jax.modules import Saved
from lora_jax.quantize import BLOCK, LEVELS, dense, quantized


def by_definition(column, kind):
    """One column of a kernel, block by block and number by number."""
    found = []
    for start in range(0, len(column), BLOCK):
        block = column[start : start + BLOCK].astype(np.float32)
        largest = np.abs(block).max() or np.float32(1)
        for number in block / largest:
            if kind == "nf4":
                found.append(min(LEVELS, key=lambda level: abs(level - number)) * largest)
            else:
                found.append(np.round(127 * number) / 127 * largest)
    return np.array(found)


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """As bitsandbytes makes them: eight above zero, seven below, and zero itself."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    wanted = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(LEVELS, wanted / wanted.max(), atol=2e-6)


@pytest.mark.parametrize("kind", quantize.KINDS)
@given(size=st.sampled_from((1, BLOCK - 1, BLOCK, 3 * BLOCK + 5)), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_number_is_its_blocks_nearest_level(kind, size, seed):
    kernel = np.random.default_rng(seed).standard_normal((size, 3)).astype(np.float32)
    found = np.asarray(dense(quantized(kernel, kind), jnp.float32))
    assert found.shape == kernel.shape
    for column in range(3):
        np.testing.assert_allclose(
            found[:, column], by_definition(kernel[:, column], kind), atol=1e-6
        )


@pytest.mark.parametrize(("kind", "error", "bits"), [("int8", 0.007, 8.5), ("nf4", 0.1, 4.5)])
def test_a_normal_kernels_error_and_memory(kind, error, bits):
    kernel = jax.random.normal(jax.random.key(0), (2, 256, 96))
    held = quantized(kernel, kind)
    lost = jnp.linalg.norm(dense(held, jnp.float32) - kernel) / jnp.linalg.norm(kernel)
    assert error / 2 < lost < error
    assert sum(x.nbytes for x in jax.tree.leaves(held)) * 8 / kernel.size == bits


def test_zeros_and_levels_come_back_exactly():
    assert not np.any(dense(quantized(jnp.zeros((70, 3)), "nf4"), jnp.float32))
    column = 3.0 * jnp.asarray(LEVELS)[:, None]
    np.testing.assert_array_equal(dense(quantized(column, "nf4"), jnp.float32), column)


def test_two_codes_share_a_byte_the_earlier_in_the_high_half():
    column = jnp.asarray([[-1.0], [1.0]] + [[0.0]] * 62)
    codes = quantized(column, "nf4").codes
    assert codes.dtype == jnp.uint8 and codes.shape == (32, 1)
    assert int(codes[0, 0]) == 0 << 4 | 15 and int(codes[1, 0]) == 7 << 4 | 7


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="unknown quantization 'int3'; choose int8 or nf4"):
        quantized(jnp.ones((64, 2)), "int3")


def in_few_bits(weights, kind):
    layers = {
        path: quantized(value, kind) if value.ndim == 3 else value
        for path, value in weights["layers"].items()
    }
    return {**weights, "layers": layers}


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("module", ["none", "lora", "ia3"])
def test_a_quantized_model_is_the_model_of_its_dequantized_kernels(
    config, weights, random_lora, random_ia3, random_tokens, hidden, kind, module
):
    adapter = {"none": lambda c: {}, "lora": random_lora, "ia3": random_ia3}[module](config)
    few = in_few_bits(weights, kind)
    found = hidden(config, few, adapter, random_tokens(2, 7))
    wanted = hidden(config, quantize.dequantized(few), adapter, random_tokens(2, 7))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert quantize.stored_bytes(few) < quantize.stored_bytes(weights)


def test_a_share_of_a_projection_leaves_a_quantized_base_the_rest(weights):
    few = in_few_bits(weights, "nf4")
    kernel = weights["layers"]["mlp.up_proj"]
    half = Saved(0.5 * kernel, jnp.array(0.5))
    changed, _ = with_saved(few, {"mlp.up_proj": half})
    held = dense(few["layers"]["mlp.up_proj"], jnp.float32)
    np.testing.assert_allclose(changed["layers"]["mlp.up_proj"], (kernel + held) / 2, atol=1e-6)


def test_gradients_reach_an_adapter_through_quantized_kernels(
    config, weights, random_lora, random_tokens
):
    adapter, few = random_lora(config), in_few_bits(weights, "nf4")

    def loss(adapter, weights):
        return jnp.sum(models.forward(config, weights, adapter, random_tokens(2, 5)).hidden ** 2)

    found = jax.jit(jax.grad(loss))(adapter, few)
    wanted = jax.jit(jax.grad(loss))(adapter, quantize.dequantized(few))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), found, wanted)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_what_would_lose_by_it_is_refused(weights):
    quantize.refuse_quantized(weights, "merging")
    with pytest.raises(InputError, match="merging: the base is held in nf4; load it without"):
        quantize.refuse_quantized(in_few_bits(weights, "nf4"), "merging")


def test_a_folder_is_loaded_into_few_bits(config, base_folder, random_tokens, hidden):
    whole = checkpoint.load_weights(base_folder, config)
    few = checkpoint.load_weights(base_folder, config, quantization="int8")
    held = few["layers"]["self_attn.q_proj"]
    assert isinstance(held, quantize.Quantized) and held.codes.shape[0] == config.layers
    assert not isinstance(few["layers"]["input_layernorm"], quantize.Quantized)
    one = quantized(whole["layers"]["self_attn.q_proj"], "int8")
    np.testing.assert_array_equal(held.codes, one.codes)
    tokens = random_tokens(2, 7)
    near, far = (hidden(config, w, {}, tokens) for w in (few, whole))
    assert 0 < jnp.linalg.norm(near - far) < 0.05 * jnp.linalg.norm(far)


def test_no_module_is_merged_into_few_bits_and_none_are_written(
    tmp_path, config, weights, random_lora
):
    few = in_few_bits(weights, "nf4")
    with pytest.raises(InputError, match="a module cannot be merged: the base is held in nf4"):
        merge(few, random_lora(config))
    with pytest.raises(InputError, match=r"cannot be written: the base is held in nf4"):
        checkpoint.write_model(tmp_path, config, few)
    merge(quantize.dequantized(few), random_lora(config))


def test_eight_devices_hold_what_one_does(run_on_devices):
    printed = run_on_devices(
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lora_jax import mesh, quantize
kernel = jax.random.normal(jax.random.key(0), (2, 256, 96))
held = quantize.quantized(kernel, "nf4")
where = NamedSharding(mesh.make_mesh(1, 2, 4), PartitionSpec(None, "fsdp", "tensor"))
spread = quantize.place(held, where)
same = np.array_equal(quantize.dense(spread, jnp.float32), quantize.dense(held, jnp.float32))
print(same, len(spread.codes.addressable_shards), spread.codes.addressable_shards[0].data.shape)
"""
    )
    assert printed.split("\n")[0] == "True 8 (2, 64, 24)"

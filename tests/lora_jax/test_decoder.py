"""What every family gets from the one forward pass: modules beyond the layers, whole weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import merge, models
from lora_jax.decoder import place, replace_weights, where
from lora_jax.modules import LoRA, Saved
from lora_jax.parts import empty_cache, put
from train.loss import Batch, batch_loss


@pytest.fixture
def outside(config):
    """A LoRA of the embedding and one of the unembedding, neither of them zero."""

    def make(seed, size_in, size_out):
        one, other = jax.random.split(jax.random.key(seed))
        a, b = jax.random.normal(one, (size_in, 2)), jax.random.normal(other, (2, size_out))
        return LoRA(0.3 * a, 0.3 * b, 2.0)

    return {
        "embed": make(0, config.vocabulary, config.width),
        "unembed": make(1, config.width, config.vocabulary),
    }


@partial(jax.jit, static_argnums=0)
def logits(config, weights, adapter, tokens):
    out = models.forward(config, weights, adapter, tokens)
    return models.unembed(config, weights, adapter, out.hidden)


@pytest.mark.parametrize("path", ["embed", "unembed"])
def test_a_lora_outside_the_layers_is_its_merged_weight(
    config, weights, outside, random_tokens, path
):
    module, tokens = outside[path], random_tokens(2, 5)
    delta = module.scale * module.a @ module.b
    untied = {**weights, "unembed": weights["embed"].T}
    whole = {**untied, path: untied[path] + delta}
    found = logits(config, weights, {path: module}, tokens)
    np.testing.assert_allclose(found, logits(config, whole, {}, tokens), atol=1e-4)
    assert not np.allclose(found, logits(config, weights, {}, tokens), atol=0.1)


def test_a_saved_weight_takes_the_bases_place(config, weights, random_lora, random_tokens):
    tokens, adapter = random_tokens(2, 5), random_lora(config)
    gain = 1 + jnp.arange(config.layers * config.width).reshape(config.layers, -1) / 50
    saved = {**adapter, "input_layernorm": Saved(gain)}
    whole = {**weights, "layers": {**weights["layers"], "input_layernorm": gain}}
    found = logits(config, weights, saved, tokens)
    np.testing.assert_allclose(found, logits(config, whole, adapter, tokens), atol=1e-5)
    merged = merge.merge(weights, saved)
    np.testing.assert_allclose(found, logits(config, merged, {}, tokens), atol=1e-4)


def test_a_weight_keeps_its_type_when_it_is_replaced(weights):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    new = replace_weights(half, {"embed": weights["embed"]})
    assert new["embed"].dtype == jnp.bfloat16


def test_positions_count_within_each_text():
    """Two padded and packed, and two that continue a shared prefix; then in a cache."""
    segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 0], [-1, -1, -1, 1, 1, 2, 2]])
    found = place(segments, segments, None, None).positions
    assert found[0, 1:6].tolist() == [0, 1, 2, 0, 1]
    assert found[1].tolist() == [0, 1, 2, 3, 4, 3, 4]
    cache = empty_cache(1, 2, 8, 1, 1, jnp.dtype("float32"))
    cache = cache.replace(segments=put(cache.segments, segments[:, :4], 0), used=4)
    assert (place(segments[:, 4:], segments[:, 4:], None, cache).positions == found[:, 4:]).all()


def test_a_position_counts_on_from_the_cached_end_of_its_row(config):
    cache = models.new_cache(config, 2, 8)
    seen = cache.segments.at[0, :4].set(1).at[1, :2].set(1)
    cache = cache.replace(segments=seen, used=jnp.asarray(4))
    segments = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    positions = place(segments, segments, None, cache).positions
    assert positions.tolist()[0][:2] == [4, 5]
    assert positions.tolist()[1][1:] == [2, 3]


def test_only_whole_rows_have_a_length_that_is_known():
    tokens = jnp.zeros((2, 5), jnp.int32)
    assert place(tokens, None, None, None).longest == 5
    assert place(tokens, tokens + 1, None, None).longest == 0
    assert place(tokens, None, tokens, None).longest == 0


def test_a_path_is_found_in_its_stack(weights):
    assert where(weights, "self_attn.q_proj") == ("layers", "self_attn.q_proj")
    assert where(weights, "embed") == (None, "embed")
    assert where({"encoder": {"k": 1}}, "encoder.k") == ("encoder", "k")


def test_every_module_outside_the_layers_is_trained(config, weights, outside, random_tokens):
    tokens = random_tokens(2, 6)
    ones, at = jnp.ones((2, 6), jnp.int32), jnp.broadcast_to(jnp.arange(6), (2, 6))
    targets = jnp.roll(tokens, -1, axis=1)
    batch = Batch(tokens, ones, at, at, targets, jnp.ones((2, 6)))
    gradients = jax.jit(jax.grad(lambda a: batch_loss(config, weights, a, batch)))(outside)

    def plain(adapter):
        chances = jax.nn.log_softmax(logits(config, weights, adapter, tokens))
        return -jnp.take_along_axis(chances, targets[..., None], axis=2).sum()

    wanted = jax.jit(jax.grad(plain))(outside)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), gradients, wanted
    )
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))

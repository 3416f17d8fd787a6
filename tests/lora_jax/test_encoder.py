"""The source side of an encoder-decoder, on a family small enough to be written out."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import encoder
from lora_jax.modules import LoRA, Saved, init_lora
from lora_jax.project import Dropout

SIZES = {"encoder.up": (2, 8, 8), "decoder.key": (3, 8, 6)}
SOURCE = jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]])
SEGMENTS = jnp.asarray([[1, 1, 1, 0], [-1, -1, 2, 2]])


def remember(config, x, step):
    """Keys of a head, and as values their negatives."""
    keys = step.project("key", x)[:, :, None]
    return keys, -keys


FAMILY = SimpleNamespace(
    begin_source=lambda config, weights, x, places: (2 * x, places.whole_mask()),
    encoder_layer=lambda config, shared, x, step: x + step.project("up", x),
    finish_source=lambda config, weights, x: x * weights["gain"],
    remember=remember,
)


@pytest.fixture(scope="module")
def weights():
    """Two layers of an encoder and three of a decoder."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape) / 2  # noqa: E731
    up, key = (draw(n, *size) for n, size in enumerate(SIZES.values()))
    stacks = {"encoder": {"up": up}, "decoder": {"key": key}}
    return {"embed": draw(2, 10, 8), "gain": draw(3, 8), **stacks}


@pytest.fixture(scope="module")
def adapter():
    """A LoRA on either stack, neither of them zero."""
    new = init_lora(jax.random.key(4), SIZES, targets=["up", "key"], rank=2, alpha=2)
    wave = lambda shape: jnp.cos(jnp.arange(np.prod(shape))).reshape(shape)  # noqa: E731
    return {path: module.replace(b=wave(module.b.shape)) for path, module in new.items()}


@partial(jax.jit, static_argnames=("observe", "remat"))
def encode(weights, adapter, **options):
    return encoder.encode(FAMILY, None, weights, adapter, SOURCE, SEGMENTS, **options)


def written_out(weights):
    """The keys (N, B, S, 1, C) by the definition."""
    x = 2 * weights["embed"][SOURCE]
    for kernel in weights["encoder"]["up"]:
        x = x + x @ kernel
    return jnp.einsum("BSD,NDC->NBSC", x * weights["gain"], weights["decoder"]["key"])[..., None, :]


def merged(weights, adapter):
    """The weights with the LoRAs in them."""
    up, key = (m.scale * m.a @ m.b for m in adapter.values())
    stacks = {"up": weights["encoder"]["up"] + up}, {"key": weights["decoder"]["key"] + key}
    return {**weights, "encoder": stacks[0], "decoder": stacks[1]}


def test_the_memory_is_every_decoder_layers_keys_and_values_of_the_encoded_source(weights):
    memory = encode(weights, {})
    np.testing.assert_allclose(memory.keys, written_out(weights), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(memory.values, -memory.keys)
    assert memory.keys.shape == (3, 2, 4, 1, 6)
    np.testing.assert_array_equal(memory.segments, SEGMENTS)
    assert memory.observed is None


def test_without_segments_a_row_is_one_text(weights):
    memory = encoder.encode(FAMILY, None, weights, {}, SOURCE)
    assert (memory.segments == 1).all()


def test_the_mask_that_layers_share_is_of_whole_texts(weights):
    seen = []
    layer = lambda config, shared, x, step: seen.append(shared) or x  # noqa: E731
    family = SimpleNamespace(**{**vars(FAMILY), "encoder_layer": layer})
    encoder.encode(family, None, weights, {}, SOURCE, SEGMENTS)
    assert seen[0].shape == (2, 1, 4, 4)
    assert seen[0][0, 0, 0].tolist() == [True, True, True, False]  # what follows, and no padding
    assert seen[0][1, 0, 2].tolist() == [True] * 4 and not seen[0][1, 0, 0, 2:].any()


def test_modules_of_both_stacks_are_their_merged_kernels(weights, adapter):
    found = encode(weights, adapter).keys
    np.testing.assert_allclose(found, written_out(merged(weights, adapter)), rtol=1e-3, atol=1e-3)
    for path in adapter:
        assert not np.allclose(encode(weights, {path: adapter[path]}).keys, found, atol=0.1)


def test_whole_weights_and_a_lora_of_the_embedding_count(weights):
    lora = LoRA(jnp.eye(10)[:, :2], jnp.ones((2, 8)), 0.5)
    changed = {"gain": weights["gain"] + 1, "embed": weights["embed"].at[:2].add(0.5)}
    found = encode(weights, {"gain": Saved(changed["gain"]), "embed": lora}).keys
    np.testing.assert_allclose(found, written_out(weights | changed), rtol=1e-3, atol=1e-3)


def test_projections_are_observed_by_their_whole_paths_and_stacked(weights, adapter):
    look = lambda path, module, x: (x, module is not None)  # noqa: E731
    observed = encode(weights, {"encoder.up": adapter["encoder.up"]}, observe=look).observed
    assert observed.keys() == {"encoder.up", "decoder.key"}
    inputs, under = observed["encoder.up"]
    np.testing.assert_allclose(inputs[0], 2 * weights["embed"][SOURCE], rtol=1e-6)
    assert inputs.shape == (2, 2, 4, 8) and under.tolist() == [True, True]
    inputs, under = observed["decoder.key"]
    assert (inputs == inputs[0]).all() and under.tolist() == [False] * 3


def test_dropout_is_felt_in_both_stacks(weights, adapter):
    def keys(seed, rate, *paths):
        some = {path: adapter[path] for path in paths}
        return encode(weights, some, dropout=Dropout(jax.random.key(seed), rate)).keys

    for path in adapter:
        np.testing.assert_array_equal(keys(0, 0.5, path), keys(0, 0.5, path))
        assert not np.allclose(keys(0, 0.5, path), keys(1, 0.5, path), atol=1e-2)
    np.testing.assert_allclose(keys(0, 0.0, *adapter), encode(weights, adapter).keys, rtol=1e-5)


def test_dropout_has_a_key_of_its_own_in_either_stack():
    """Else a decoder's layer would drop what the encoder's layer of its number does."""
    dropped = lambda x, step: step.project("up", jnp.ones_like(x))  # noqa: E731
    family = SimpleNamespace(
        begin_source=lambda config, weights, x, places: (x, None),
        encoder_layer=lambda config, shared, x, step: dropped(x, step),
        finish_source=lambda config, weights, x: x,
        remember=lambda config, x, step: (x, dropped(x, step)),
    )
    nothing = {"up": jnp.zeros((1, 8, 8))}
    weights = {"embed": jnp.ones((10, 8)), "encoder": nothing, "decoder": nothing}
    same = dict.fromkeys(("encoder.up", "decoder.up"), LoRA(jnp.eye(8)[None], jnp.eye(8)[None]))
    dropout = Dropout(jax.random.key(0), 0.5)
    memory = encoder.encode(family, None, weights, same, SOURCE, dropout=dropout)
    for found in (memory.keys, memory.values):
        assert np.unique(found).tolist() == [0.0, 2.0]
    assert (memory.keys != memory.values).any()


def test_rematerialising_changes_no_key_and_no_gradient(weights, adapter):
    def loss(adapter, remat):
        return jnp.sum(encode(weights, adapter, remat=remat).keys ** 2)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, again = (both(adapter, remat) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), again, plain)

"""What holds for every causal family; a family joins by a row."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import checkpoint, models, quantize, table
from lora_jax.families import gemma3, gpt2, llama, phi, phi3
from lora_jax.quantize import dense, quantized
from lora_jax.rope import Rope

LLAMA = llama.Config("llama", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), tied=True)
PHI = phi.Config(264, 32, 64, 2, 4, kv_heads=2, context=128, rope=Rope(4))
GEMMA3 = gemma3.Config(
    264, 32, 64, 2, 4, 2, 8, 128, (True, False), Rope(8, 1e6), Rope(8), window=3, query_scalar=8
)
FAMILIES = {
    "llama": LLAMA,
    "llama, other options": replace(
        LLAMA,
        kind="qwen3",
        eps=1e-5,
        tied=False,
        qkv_bias=True,
        output_bias=True,
        qk_norm=True,
        window=3,
        unwindowed=(0,),
    ),
    "phi3": phi3.Config(264, 32, 48, 2, 4, 2, 8, 128, Rope(4, 100.0), window=4),
    "gemma3": GEMMA3,
    "gemma3, other options": replace(
        GEMMA3, rope=Rope(8, 2e5, "linear", 8.0), query_scalar=12, eps=1e-5, tied=False
    ),
    "gpt2": gpt2.Config(264, 32, 64, 2, 4, context=128),
    "gpt2, other options": gpt2.Config(
        264, 32, 48, 2, 4, 16, "relu", 1e-6, tied=False, scaled=False, scaled_by_layer=True
    ),
    "phi": PHI,
    "phi, other options": replace(
        PHI, rope=Rope(8, 5e5), activation="gelu", eps=1e-6, tied=True, qk_norm=True
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def config(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def weights(config, random_weights):
    return random_weights(config)


@pytest.fixture(scope="module")
def adapter(config, random_lora):
    """A LoRA on every projection."""
    return random_lora(config, targets=["all-linear"])


def test_a_state_depends_on_its_past_and_never_on_its_future(config, weights):
    @jax.jit
    @jax.grad
    def gradient(embed):
        tokens = jnp.arange(9)[None]
        return models.forward(config, {**weights, "embed": embed}, {}, tokens).hidden[0, 5, 0]

    strength = np.abs(gradient(weights["embed"])).sum(-1)[:9]
    assert (strength[:6] > 1e-4).all()
    assert not strength[6:].any()


@pytest.fixture
def states(config, weights, hidden, adapter):
    """A function to the states of up to eight tokens, padded to eight so that it compiles once."""

    def run(tokens, segments=None, left=0):
        segments = [1] * len(tokens) if segments is None else segments
        row, where = np.full((1, 8), 99), np.zeros((1, 8), np.int32)
        row[0, left : left + len(tokens)] = tokens
        where[0, left : left + len(tokens)] = segments
        found = hidden(config, weights, adapter, row, segments=jnp.asarray(where))
        return found[0, left : left + len(tokens)]

    return run


@pytest.fixture(scope="module")
def text(random_tokens):
    return np.asarray(random_tokens(8))


@pytest.mark.parametrize("left", [0, 2])
def test_padding_on_either_side_changes_nothing(
    config, weights, hidden, adapter, states, text, left
):
    alone = hidden(config, weights, adapter, text[None, :5])
    np.testing.assert_allclose(states(text[:5], left=left), alone[0], atol=1e-5)


def test_packed_texts_are_as_if_alone(states, text):
    packed = states(text, [1] * 3 + [2] * 5)
    np.testing.assert_allclose(packed[:3], states(text[:3]), atol=2e-5)
    np.testing.assert_allclose(packed[3:], states(text[3:]), atol=2e-5)


def test_continuations_of_a_shared_prefix_are_as_if_alone(states, text):
    packed = states(text, [-1] * 3 + [1] * 3 + [2] * 2)
    np.testing.assert_allclose(packed[:6], states(text[:6]), atol=2e-5)
    np.testing.assert_allclose(packed[6:], states(text[[0, 1, 2, 6, 7]])[3:], atol=2e-5)


def test_step_by_step_through_the_cache_equals_the_whole(config, weights, adapter, states, text):
    """Rows of unequal prompts, right-padded, then three more tokens, in one shared cache."""
    rows, prompts = [text[:6], text[3:8]], (3, 2)
    step = jax.jit(
        lambda tokens, segments, cache: models.forward(
            config, weights, adapter, tokens, segments=segments, cache=cache
        )
    )
    cache = models.new_cache(config, batch=2, slots=6)
    first, then = np.stack([text[:3], text[3:6]]), np.stack([text[3:6], text[5:8]])
    out = step(first, jnp.asarray([[1, 1, 1], [1, 1, 0]]), cache)
    more = step(then, jnp.ones((2, 3), jnp.int32), out.cache)
    for n, (row, length) in enumerate(zip(rows, prompts, strict=True)):
        seen = jnp.concatenate([out.hidden[n, :length], more.hidden[n]])
        np.testing.assert_allclose(seen, states(row), atol=2e-5)


def test_every_weight_counts(config, weights, text):
    """The logits have a gradient by each layer's share of each weight."""

    @jax.jit
    @jax.grad
    def gradient(weights):
        states = models.forward(config, weights, {}, text[None]).hidden
        return jnp.sum(models.unembed(config, weights, {}, states) ** 2)

    for path, found in table.flatten(gradient(weights)).items():
        by_layer = np.abs(found).reshape(config.layers if path.startswith("layers.") else 1, -1)
        assert (by_layer.max(axis=1) > 1e-4).all(), path


def test_bfloat16_states_are_bfloat16_and_near_float32(config, weights, hidden, adapter, text):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    rough, fine = (hidden(config, w, adapter, text[None, :5]) for w in (half, weights))
    assert rough.dtype == jnp.bfloat16 and fine.dtype == jnp.float32
    assert jnp.mean(jnp.abs(rough - fine)) < 0.06 * jnp.mean(jnp.abs(fine))


def test_a_config_round_trips_through_its_json(config):
    assert models.config_from_huggingface(models.config_to_huggingface(config)) == config


def test_a_model_saved_and_loaded_is_equal(tmp_path, config, weights):
    checkpoint.save_model(tmp_path / "model", config, weights)
    loaded = checkpoint.load_weights(tmp_path / "model", checkpoint.read_config(tmp_path / "model"))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), loaded, weights))


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_base_in_few_bits_is_the_base_of_its_numbers(config, weights, adapter, kind):
    """Forward and the module's gradient: exactly as with the kernels that the bits stand for."""
    layers = weights["layers"]
    kernels = {path: quantized(x, kind) for path, x in layers.items() if x.ndim == 3}
    few = layers | kernels
    back = layers | {path: dense(x, jnp.float32) for path, x in kernels.items()}
    tokens = jnp.arange(10)[None] % 64

    @jax.jit
    @jax.value_and_grad
    def loss(adapter, layers):
        states = models.forward(config, {**weights, "layers": layers}, adapter, tokens).hidden
        return jnp.sum(states * jnp.cos(jnp.arange(states.size)).reshape(states.shape))

    (held, by_bits), (whole, by_numbers) = loss(adapter, few), loss(adapter, back)
    np.testing.assert_allclose(held, whole, rtol=1e-4)
    for ours, theirs in zip(*map(jax.tree.leaves, (by_bits, by_numbers)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    exact = loss(adapter, layers)[0]
    assert abs(held - exact) > 1e-3 * abs(exact) or kind == "int8"

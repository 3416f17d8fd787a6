import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.routing.given import with_weights
from compose.routing.probe import activations, instance_weights
from lora_jax import models
from lora_jax.errors import InputError

Q = "self_attn.q_proj"


def inputs(config, weights, adapter, row, path):
    """What a projection reads of one text alone (N, T, I), with no padding."""
    found = models.forward(
        config, weights, adapter, row[None], observe=lambda p, m, x: x if p == path else None
    ).observed
    return np.asarray(found[path][:, 0], np.float64)


@pytest.fixture(scope="module")
def padded(random_tokens):
    """Three texts of unequal length, their segments (B, T), and each by itself."""
    tokens = random_tokens(3, 8)
    lengths = jnp.array([8, 5, 2])
    segments = (jnp.arange(8) < lengths[:, None]).astype(jnp.int32)
    return tokens, segments, [tokens[n, :length] for n, length in enumerate(lengths.tolist())]


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_activations_are_the_unit_mean_over_texts(config, weights, members, padded, pool):
    tokens, segments, texts = padded
    batches = [(tokens[:2], segments[:2]), (tokens[2:], segments[2:])]
    found = activations(config, weights, members[0], batches, pool=pool)
    assert found.keys() == members[0].keys()
    read = [inputs(config, weights, members[0], text, Q) for text in texts]
    want = sum(x[:, -1] if pool == "last" else x.mean(1) for x in read)
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(found[Q], want, atol=1e-5)


@pytest.mark.parametrize("signal", ["norm", "entropy"])
@pytest.mark.parametrize("probed", [False, True], ids=["the base", "a module"])
def test_texts_are_mixed_by_how_loudly_modules_answer(
    config, weights, library, members, padded, signal, probed
):
    tokens, segments, texts = padded
    probe = members[1] if probed else {}
    options = {"top_k": 2, "signal": signal, "probe": probe}
    found = instance_weights(config, weights, library, tokens, segments, **options)
    for row, text in zip(found, texts, strict=True):
        x = inputs(config, weights, probe, text, Q)[-1, -1]
        outs = [m[Q].scale * x @ np.asarray(m[Q].a[-1] @ m[Q].b[-1], np.float64) for m in members]
        if signal == "norm":
            scores = np.array([np.linalg.norm(out) for out in outs])
        else:
            chances = [np.exp(out - out.max()) / np.exp(out - out.max()).sum() for out in outs]
            scores = np.array([1 / (1e-6 - (p * np.log(p)).sum()) for p in chances])
        want = np.where(scores >= np.sort(scores)[-2], scores, 0)
        np.testing.assert_allclose(row, want / want.sum(), rtol=1e-3, atol=1e-5)


def test_a_batch_mixed_by_text_is_each_text_mixed_by_itself(config, weights, library, padded):
    tokens, segments, texts = padded
    by_text = instance_weights(config, weights, library, tokens, segments, top_k=2)
    mixed = with_weights(library, by_text, top_k=2)
    forward = jax.jit(models.forward, static_argnums=0)
    found = forward(config, weights, mixed, tokens, segments=segments).hidden
    for n, text in enumerate(texts):
        alone = forward(config, weights, with_weights(library, by_text[n]), text[None]).hidden[0]
        np.testing.assert_allclose(found[n, : len(text)], alone, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_probed_is_told(config, weights, library, members, random_tokens):
    tokens = random_tokens(1, 4)
    with pytest.raises(InputError, match=r"5 modules; got 6; unknown signal 'loud'; choose norm"):
        instance_weights(config, weights, library, tokens, top_k=6, signal="loud")
    with pytest.raises(InputError, match=r"no module at 'mlp\.up_proj' to probe; the library has"):
        instance_weights(config, weights, library, tokens, top_k=1, at="mlp.up_proj")
    with pytest.raises(InputError, match="unknown pool 'first'"):
        activations(config, weights, members[0], [], pool="first")
    with pytest.raises(InputError, match="no batch"):
        activations(config, weights, members[0], [])

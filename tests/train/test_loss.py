"""The chunked loss is the plain one, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models import Unembedding
from train import loss
from train.loss import Batch, batch_loss, token_losses, trained_losses


def plain(hidden, kernel, targets):
    chances = jax.nn.log_softmax((hidden @ kernel).astype(jnp.float32))
    return -jnp.take_along_axis(chances, targets[:, None], axis=1)[:, 0]


@pytest.fixture
def problem():
    """A function from a count to hidden states, an unembedding, targets and a cotangent."""

    def make(count, dtype=jnp.float32):
        keys = jax.random.split(jax.random.key(count), 4)
        hidden = jax.random.normal(keys[0], (count, 16)).astype(dtype)
        kernel = (2 * jax.random.normal(keys[1], (16, 50))).astype(dtype)
        targets = jax.random.randint(keys[2], (count,), 0, 50)
        return hidden, kernel, targets, jax.random.normal(keys[3], (count,))

    return make


@pytest.mark.parametrize("count", [1, 16, 20])
def test_chunked_equals_plain(problem, monkeypatch, count):
    monkeypatch.setattr(loss, "CHUNK", 8)  # so that the counts divide it, or do not
    hidden, kernel, targets, cotangent = problem(count)
    ours, pull = jax.vjp(lambda h: token_losses(h, Unembedding(kernel), targets), hidden)
    theirs, pull_plain = jax.vjp(lambda h: plain(h, kernel, targets), hidden)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(cotangent)[0], pull_plain(cotangent)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(token_losses(hidden, Unembedding(kernel), targets), ours, rtol=1e-6)


def test_bfloat16_stays_near_float32(problem):
    hidden, kernel, targets, cotangent = problem(20, jnp.bfloat16)
    ours, pull = jax.vjp(lambda h: token_losses(h, Unembedding(kernel), targets), hidden)
    exact, pull_exact = jax.vjp(
        lambda h: plain(h, kernel.astype(jnp.float32), targets), hidden.astype(jnp.float32)
    )
    gradient, gradient_exact = pull(cotangent)[0], pull_exact(cotangent)[0]
    assert ours.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours, exact, rtol=0.02, atol=0.1)
    error = jnp.linalg.norm(gradient.astype(jnp.float32) - gradient_exact)
    assert error < 0.02 * jnp.linalg.norm(gradient_exact)


def test_maps_over_modules_under_jit(problem):
    hidden, kernel, targets, cotangent = problem(12)
    stack = jnp.stack([hidden, 2 * hidden, -hidden])

    def gradient(function, head):
        return jax.grad(lambda h: jnp.vdot(function(h, head, targets), cotangent))

    ours = jax.jit(jax.vmap(gradient(token_losses, Unembedding(kernel))))(stack)
    np.testing.assert_allclose(ours, jax.vmap(gradient(plain, kernel))(stack), rtol=1e-4, atol=1e-5)


def test_the_unembedding_is_frozen(problem):
    hidden, kernel, targets, _ = problem(12)
    gradient = jax.grad(lambda k: token_losses(hidden, Unembedding(k), targets).sum())(kernel)
    assert not np.any(gradient)


def test_a_trained_unembedding_gets_its_gradient_in_chunks(problem, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    hidden, kernel, targets, cotangent = problem(20)
    bias = jnp.linspace(-1, 1, 50)

    def biased(h, k, b):
        logits = (h @ k + b).astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]

    ours, pull = jax.vjp(
        lambda h, k, b: trained_losses(h, Unembedding(k, b), targets), hidden, kernel, bias
    )
    theirs, pull_plain = jax.vjp(biased, hidden, kernel, bias)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(pull(cotangent), pull_plain(cotangent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    frozen = token_losses(hidden, Unembedding(kernel, bias), targets)
    np.testing.assert_allclose(frozen, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def batch(random_tokens):
    tokens = random_tokens(2, 12)
    scored = jnp.tile(jnp.arange(8), (2, 1))
    targets = jnp.take_along_axis(tokens, scored + 1, axis=1)
    positions = jnp.tile(jnp.arange(12), (2, 1))
    return Batch(tokens, jnp.ones_like(tokens), positions, scored, targets, jnp.ones((2, 8)))


def test_batch_loss_is_cross_entropy_of_the_next_tokens(
    config, weights, random_lora, hidden, batch
):
    adapter = random_lora(config)
    states = hidden(config, weights, adapter, batch.tokens)
    chances = jax.nn.log_softmax(models.unembed(config, weights, {}, states))[:, :8]
    wanted = -jnp.take_along_axis(chances, batch.tokens[:, 1:9, None], axis=2).sum()
    ours = jax.jit(lambda b: batch_loss(config, weights, adapter, b))(batch)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_filling_and_empty_rows_change_neither_loss_nor_gradient(
    config, weights, random_lora, batch
):
    adapter = random_lora(config)

    @jax.jit
    def value(batch):
        return jax.value_and_grad(lambda a: batch_loss(config, weights, a, batch))(adapter)

    def widen(x, fill):
        return jnp.pad(x, ((0, 0), (0, 5)), constant_values=fill)

    def add_rows(x):
        return jnp.pad(x, ((0, 2), (0, 0)))

    filled = batch.replace(
        scored=widen(batch.scored, 3),
        targets=widen(batch.targets, 9),
        weights=widen(batch.weights, 0),
    )
    ours, theirs = value(jax.tree.map(add_rows, filled)), value(batch)
    assert np.isfinite(ours[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), ours, theirs)

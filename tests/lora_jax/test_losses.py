"""Likelihoods are exact, and cutting changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.losses import cross_entropy, in_chunks


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits = 5 * jax.random.normal(jax.random.key(0), (3, 4, 7))
    targets = jax.random.randint(jax.random.key(1), (3, 4), 0, 7)
    losses, total = cross_entropy(logits, targets)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = -np.log(np.take_along_axis(chances, np.asarray(targets)[..., None], -1)[..., 0])
    np.testing.assert_allclose(losses, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, np.log(np.exp(logits).sum(-1)), rtol=1e-5)


def test_large_logits_do_not_overflow():
    losses, _ = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert losses[0] == 2e4


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 4, 6, 7])
def test_chunks_join_to_the_whole(axis, size):
    shape = (5, 6, 3) if axis == 1 else (6, 5, 3) if axis == 0 else (5, 3, 6)
    x, y = (jax.random.normal(jax.random.key(n), shape) for n in (0, 1))
    seen = []

    def function(x, y):
        seen.append(x.shape[axis])
        return x * y, {"sum": x + y}

    found = jax.jit(lambda x, y: in_chunks(function, (x, y), size, axis))(x, y)
    jax.tree.map(np.testing.assert_array_equal, found, (x * y, {"sum": x + y}))
    assert set(seen) == {min(size, 6)}

"""Likelihoods do not depend on how the logits are cut."""

import jax
import numpy as np
import pytest

from eval import likelihood


@pytest.mark.parametrize("logits", [1, 264 * 3 * 4, 1 << 30])
def test_chunks_change_nothing(config, weights, random_tokens, monkeypatch, logits):
    monkeypatch.setattr(likelihood, "_LOGITS", logits)
    hidden = jax.random.normal(jax.random.key(0), (3, 13, 32))
    targets = random_tokens(3, 13)
    found = likelihood.token_nll(config, weights, {}, hidden, targets)
    chances = jax.nn.log_softmax(hidden @ weights["embed"].T)
    right = -np.take_along_axis(np.asarray(chances), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)

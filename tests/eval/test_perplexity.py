"""Every token but the first is scored once, with the context that the protocol gives it."""

import jax
import numpy as np
import pytest

from eval import perplexity
from lora_jax.errors import InputError


def direct(nll, weights, tokens, window, stride):
    """Hugging Face's loop: the nats of each window's new tokens."""
    nats, end = [], 0
    for start in range(0, len(tokens), stride):
        last = min(start + window, len(tokens))
        nats += list(nll(weights, {}, tokens[start:last])[-(last - end) :])
        end = last
        if end == len(tokens):
            break
    return np.array(nats)


@pytest.mark.parametrize(
    "size, window, stride", [(200, 32, 16), (90, 32, 12), (20, 32, 16), (33, 32, 31)]
)
def test_equals_a_direct_loop(config, weights, nll, random_tokens, size, window, stride):
    tokens = np.asarray(random_tokens(size))
    whole = perplexity.windows(tokens, window, stride)
    found = jax.jit(perplexity.window_nll, static_argnums=0)(config, weights, {}, whole)
    right = direct(nll, weights, tokens, window, stride)
    assert whole.scored.sum() == size - 1 == len(right)
    np.testing.assert_allclose(np.sum(found), right.sum(), rtol=1e-5)


def test_each_token_is_scored_once():
    tokens = np.arange(1, 101)
    whole = perplexity.windows(tokens, 32, 12)
    targets = whole.tokens[:, -12:][whole.scored == 1]
    assert targets.tolist() == list(range(2, 101))


def test_an_opening_token_stands_first_in_every_window_and_is_never_scored():
    tokens = np.arange(1, 101)
    plain, opened = (perplexity.windows(tokens, 32, 12, *first) for first in ((), (999,)))
    whole = plain.tokens[:, 0] > 1
    assert whole.any() and (opened.tokens[whole, 0] == 999).all()
    np.testing.assert_array_equal(opened.tokens[:, 1:], plain.tokens[:, 1:])
    np.testing.assert_array_equal(opened.tokens[~whole], plain.tokens[~whole])
    np.testing.assert_array_equal(opened.scored, plain.scored)


def test_batches_hold_every_window_once():
    whole = perplexity.windows(np.arange(500), 32, 16)
    planned = perplexity.batches(whole, tokens=200, multiple=4)
    assert np.concatenate([n for n, _ in planned]).tolist() == list(range(len(whole.tokens)))
    assert {b.tokens.shape for _, b in planned} == {(8, 32)}
    assert sum(b.scored.sum() for _, b in planned) == 499


@pytest.mark.parametrize("stride", [0, 32])
def test_a_stride_that_leaves_no_context_is_refused(stride):
    with pytest.raises(InputError, match="stride"):
        perplexity.windows(np.arange(100), 32, stride)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(InputError, match="two tokens"):
        perplexity.windows(np.arange(1), 32, 16)

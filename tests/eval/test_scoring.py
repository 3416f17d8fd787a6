"""Scores are those of whole texts, one by one, whatever is shared, padded or stacked."""

import jax
import numpy as np
import pytest

from eval import batches, compare, devices, scoring
from eval.harness_requests import item
from lora_jax.families import gpt2


def measured(run, adapters, items, **size):
    planned = batches.plan(items, **{"tokens": 10_000, "program": 10_000} | size)
    return compare.measure(run, compare.stacks(adapters), planned, "test")


def close(found, expected):
    for scores, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores[: len(right)], right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("score", scoring.SCORES)
def test_equals_whole_texts_one_by_one(config, weights, encoded, reference, score):
    run = devices.spread(scoring.score, config, weights, "one")
    [found] = measured(run, [{}], encoded(score))
    close(found, reference(weights, {}, score))


@pytest.mark.parametrize("tokens, program", [(1, 10_000), (10_000, 60)])
def test_batches_and_padding_change_nothing(
    config, weights, random_lora, encoded, reference, tokens, program
):
    adapter = random_lora(config)
    run = devices.spread(scoring.score, config, weights, "one")
    [found] = measured(run, [adapter], encoded("text_mean"), tokens=tokens, program=program)
    close(found, reference(weights, adapter, "text_mean"))


def test_likelihoods_tell_how_many_tokens_are_not_the_likeliest(
    config, weights, encoded, questions, tokenizer, hidden
):
    runs = (devices.spread(f, config, weights, "one") for f in (scoring.score, scoring.likelihood))
    [nats], [found] = (measured(run, [{}], encoded("sum")) for run in runs)
    for question, scores, values in zip(questions, nats, found, strict=True):
        for n, (prompt, answer) in enumerate(zip(question.prompts, question.answers, strict=True)):
            tokens = np.array(tokenizer(prompt + answer)["input_ids"])
            start = max(len(tokenizer(prompt)["input_ids"]), 1)
            padded = np.pad(tokens, (0, 128 - len(tokens)))[None]
            likeliest = np.argmax(hidden(config, weights, {}, padded)[0] @ weights["embed"].T, -1)
            missed = likeliest[start - 1 : len(tokens) - 1] != tokens[start:]
            assert values[n][1] == missed.sum() and values[n][0] == pytest.approx(scores[n])


def test_pads_count_nothing(config, weights, encoded):
    items = encoded("sum")
    [(indices, batch)] = batches.plan(items, tokens=100_000, program=100_000, multiple=16)
    scores = jax.jit(scoring.score, static_argnums=0)(config, weights, {}, batch)
    assert len(indices) == len(items) < 16 == len(scores)
    assert np.isfinite(scores).all()
    assert not np.any(scores[len(items) :])


def test_answers_unembed_no_prompt(encoded):
    [(_, whole)] = batches.plan(encoded("text_mean"), tokens=100_000, program=100_000)
    [(_, answer)] = batches.plan(encoded("answer_mean")[:2], tokens=100_000, program=100_000)
    assert whole.shared == whole.prefix.shape[1] - 1
    assert answer.shared <= 1  # the space that all answers begin with


def test_score_has_a_gradient_for_the_adapter(config, weights, random_lora, encoded):
    [(_, batch)] = batches.plan(encoded("sum"), tokens=100_000, program=100_000)
    adapter = random_lora(config)
    total = jax.jit(jax.grad(lambda a: scoring.score(config, weights, a, batch).sum()))
    gradient = total(adapter)
    assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_fills_a_choice_stays_within_learned_positions(random_weights):
    """A long prefix with a short choice, batched with a short prefix and long choices."""
    config = gpt2.Config(264, 32, 64, 2, 4, context=32)
    weights = random_weights(config)
    full = [(("a", "b"), list(range(29)), [choice]) for choice in (5, 6)]
    long = [(("c", "d"), [1, 2, 3], list(range(20 + n, 30 + n))) for n in (0, 20)]
    items = [item(requests, config.context) for requests in (full, long)]

    program = jax.jit(scoring.likelihood, static_argnums=0)

    def scores(items):
        [(order, batch)] = batches.plan(items, tokens=4096, program=512)
        return program(config, weights, {}, batch)[: len(order), :, 0]

    alone = np.concatenate([scores([one]) for one in items])
    np.testing.assert_allclose(scores(items), alone, rtol=1e-4)

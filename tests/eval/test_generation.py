"""Batched generation writes what each prompt would get alone, and stops where it should."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.expression import evaluate
from compose.library import Library
from eval import generation
from eval.generation import Sampling, generate
from lora_jax.errors import InputError

PROMPTS = [[1, 2, 3], [70, 71, 72, 73, 74, 75, 76, 77], [5], [9, 8, 7, 6]]


@pytest.fixture(scope="module")
def routed(config, random_lora):
    library = Library(("a", "b"), (random_lora(config, 2), random_lora(config, 3)))
    return evaluate("arrow(library, top_k=1)", {"library": library})


@pytest.mark.parametrize("kind", ["base", "lora", "routed"])
def test_greedy_equals_whole_forwards(config, weights, hidden, random_lora, routed, kind):
    adapter = {"base": {}, "lora": random_lora(config), "routed": routed}[kind]
    written = generate(
        config, weights, adapter, PROMPTS, stop=-1, sampling=Sampling(max_new_tokens=8)
    )
    for prompt, found in zip(PROMPTS, written, strict=True):
        text = list(prompt)
        for _ in range(8):
            states = hidden(config, weights, adapter, [text + [0] * (20 - len(text))])
            text.append(int(jnp.argmax(states[0, len(text) - 1] @ weights["embed"].T)))
        assert found == text[len(prompt) :]


def test_a_sample_does_not_depend_on_its_batch(config, weights):
    sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, top_k=50)

    def drawn(**options):
        options = {"sampling": sampling} | options
        return generate(config, weights, {}, PROMPTS, stop=-1, **options)

    assert drawn() == drawn(tokens=1)
    assert drawn() != drawn(sampling=replace(sampling, seed=1))


def test_prompts_of_like_length_share_a_batch():
    planned = generation._by_length([[0] * n for n in (1, 30, 8, 12, 31, 5)], new=8, tokens=32)
    assert planned == [(8, [0, 2]), (8, [5]), (12, [3]), (32, [1]), (32, [4])]


def test_a_reply_ends_at_stop(config, weights):
    sampling = Sampling(max_new_tokens=8)
    whole = generate(config, weights, {}, PROMPTS, stop=-1, sampling=sampling)
    stop = whole[0][3]
    cut = generate(config, weights, {}, PROMPTS, stop=stop, sampling=sampling)
    for reply, full in zip(cut, whole, strict=True):
        assert reply == (full[: full.index(stop)] if stop in full else full)


def test_a_reply_may_be_ended_by_whoever_reads_along(config, weights):
    sampling, seen = Sampling(max_new_tokens=40), []

    def ended(n: int, reply: list[int]) -> bool:
        seen.append((n, reply))
        return n != 1

    whole, cut = (
        generate(config, weights, {}, PROMPTS, stop=-1, sampling=sampling, ended=judge)
        for judge in (None, ended)
    )
    assert cut == [full if n == 1 else full[:16] for n, full in enumerate(whole)]
    assert [n for n, _ in seen] == [0, 1, 2, 3, 1, 1]
    assert [reply for n, reply in seen if n == 1] == [whole[1][:size] for size in (16, 32, 40)]


def test_choices_keep_to_top_k_and_top_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 200)[:, None]

    def drawn(**options):
        sampling = replace(Sampling(temperature=1.0), **options)
        chosen = jax.vmap(lambda key: generation._choose(logits, key, sampling))(keys)
        return set(np.asarray(chosen).ravel().tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_p=0.1) == {0}


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
    ],
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Sampling(**options)

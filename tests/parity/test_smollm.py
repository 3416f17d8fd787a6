"""The real model, against transformers on torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eval import generation
from lora_jax import models, tokens

TEXTS = [
    "The sea is calm today, and the ships lie still in the harbour.",
    "def add(a, b):\n    return a + b",
    "In 1969, people first walked on the Moon.",
]


@pytest.fixture(scope="module")
def padded(tokenizer):
    """The texts right-padded, and which tokens are real."""
    ids = tokens.encode(tokenizer, TEXTS)
    width = max(map(len, ids))
    rows = np.array([row + [0] * (width - len(row)) for row in ids])
    real = np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return rows, real


def test_logits(smollm, torch_smollm, torch_logits, logits, padded, agree):
    rows = padded[0][:1]
    ours = logits(smollm.config, smollm.weights, {}, rows)
    agree("SmolLM2 logits", ours, torch_logits(torch_smollm, rows), 1e-3)


def test_padded_logits(smollm, torch_smollm, torch_logits, logits, padded, agree):
    rows, real = padded
    ours = logits(smollm.config, smollm.weights, {}, rows, segments=jnp.asarray(real))
    theirs = torch_logits(torch_smollm, rows, attention_mask=torch.tensor(real))
    shown = real[..., None] == 1
    agree("SmolLM2 padded logits", ours * shown, theirs * shown, 1e-3)


def test_cached_logits(smollm, torch_smollm, torch_logits, padded, agree):
    """A prompt of five tokens and then one at a time, against the whole text at once."""
    rows = padded[0][:1, :10]
    cache, start, seen = models.new_cache(smollm.config, 1, 10), 0, []
    for end in (5, 6, 7, 8, 9, 10):
        out = models.forward(
            smollm.config, smollm.weights, {}, jnp.asarray(rows[:, start:end]), cache=cache
        )
        cache, start = out.cache, end
        seen.append(models.unembed(smollm.config, smollm.weights, {}, out.hidden))
    theirs = torch_logits(torch_smollm, rows)
    agree("SmolLM2 cached logits", jnp.concatenate(seen, axis=1), theirs, 1e-3)


def test_greedy_text(smollm, torch_smollm, tokenizer, report):
    questions = ["What is the capital of Germany?", "Why is the sky blue?"]
    prompts = [
        tokens.chat(tokenizer, [{"role": "user", "content": q}], open_reply=True) for q in questions
    ]
    ids = tokens.encode(tokenizer, prompts)
    ours = generation.generate(
        smollm.config,
        smollm.weights,
        {},
        ids,
        stop=tokenizer.eos_token_id,
        sampling=generation.Sampling(max_new_tokens=16),
    )
    for prompt, reply, question in zip(ids, ours, questions, strict=True):
        with torch.no_grad():
            theirs = torch_smollm.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0, len(prompt) :].tolist()
        assert tokenizer.decode(reply) == tokenizer.decode(theirs, skip_special_tokens=True)
        report(f"SmolLM2 greedy text equal: {question} {tokenizer.decode(reply)[:50]!r}")
    assert tokenizer.decode(ours[0]) == "The capital of Germany is Berlin."

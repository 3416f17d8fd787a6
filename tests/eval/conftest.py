"""What the evaluation tests share: a tokenizer, questions of every shape, and a plain reference."""

import jax
import numpy as np
import pytest

from eval import items
from eval.prompts import Question
from lora_jax.tokens import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(base_folder):
    """The tiny base's byte-level tokenizer."""
    return load_tokenizer(base_folder)


def question(prompts, answers, label=0, group="") -> Question:
    """A question of these prompts, or of one prompt for all answers."""
    prompts = (prompts,) * len(answers) if isinstance(prompts, str) else prompts
    lengths = tuple(len(answer.strip()) for answer in answers)
    return Question(tuple(prompts), tuple(answers), lengths, label, group, "here")


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Answers that share nothing, much or all but an ending; two to five; prompts apart."""
    return [
        question("What is red? A:", (" a rose", " the deep sea", " grass", " x")),
        question("Pick:", ("y", "n")),
        question("Q: where? A:", (" in the big house", " in the big hall", " in the big")),
        question(("Ann met Bob as ", "Zoe met Bob as "), ("she ran.", "she ran.")),
        question("", ("one whole sentence.", "one other sentence.")),
        question("Répondez : où ?", (" là-bas", " ici", " là", " où", " à côté")),
        question(
            "A much longer prompt than any other of the lot, so that T differs:", (" a", " b")
        ),
    ]


@pytest.fixture(scope="session")
def encoded(questions, tokenizer):
    """A function from a score's name to the questions as items."""
    return lambda score: items.items(questions, tokenizer, score=score, style="plain", context=128)


@pytest.fixture(scope="session")
def nll(config, hidden):
    """A function to each token's nats given those before it, by one plain forward of one text."""

    def run(weights, adapter, tokens) -> np.ndarray:
        padded = np.zeros((1, 128), np.int32)  # a pad comes after all that could see it
        padded[0, : len(tokens)] = tokens
        logits = jax.nn.log_softmax(
            hidden(config, weights, adapter, padded)[0] @ weights["embed"].T
        )
        return -np.asarray(logits)[np.arange(len(tokens) - 1), tokens[1:]]

    return run


@pytest.fixture(scope="session")
def reference(questions, tokenizer, nll):
    """A function to every choice's score, text by text: the definitions, word for word."""

    def one(weights, adapter, prompt, answer, score) -> float:
        tokens = tokenizer(prompt + answer)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])  # bytes: never one token over the border
        nats = nll(weights, adapter, tokens)
        own = nats[max(start - 1, 0) :]
        match score:
            case "text_mean":
                return nats.mean()
            case "answer_mean":
                return own.mean()
            case "sum":
                return own.sum()
        return own.sum() / len(answer.strip())

    return lambda weights, adapter, score: [
        [one(weights, adapter, p, a, score) for p, a in zip(q.prompts, q.answers, strict=True)]
        for q in questions
    ]

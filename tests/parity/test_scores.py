"""Multiple choice on the real model, against the definition computed with transformers on torch."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import batches, compare, devices, items, prompts, rows, scoring, tasks

ROWS = {"answer_mean": 100, "text_mean": 25, "sum": 25, "char": 25}
DATA = Path(os.environ.get("LORA_JAX_DATA") or Path(__file__).parents[3] / "shared" / "data")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "pink")
THINGS = ("an apple", "the sky", "fresh snow", "a ripe banana", "grass", "coal", "a carrot", "milk")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Where ARC-easy's test rows are; if they are nowhere, rows of our own take their place."""
    if (DATA / "arc_easy" / "test.jsonl").is_file():
        return DATA
    made, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    (made / "arc_easy").mkdir()
    with (made / "arc_easy" / "test.jsonl").open("w") as file:
        for _ in range(max(ROWS.values())):
            words = draw.sample(COLOURS, draw.randint(3, 5))
            question = f"What colour is {draw.choice(THINGS)}, of {len(words)} colours?"
            file.write(json.dumps({"question": question, "choices": words, "label": 0}) + "\n")
    return made


@pytest.fixture(scope="module")
def questions(root, tokenizer):
    task = tasks.find("arc_easy")
    form = task.form("plain")
    found = rows.load_rows(task, form, root, limit=max(ROWS.values()))
    surround = prompts.frame("plain", tokenizer)
    return [prompts.pose(task, form, row, surround) for row in found]


@pytest.fixture(scope="module")
def theirs(questions, tokenizer, torch_model, smollm):
    """For each question and choice, the nats of the text's tokens and how many are the answer's."""
    model = torch_model(smollm.folder)

    def nats(prompt, answers):
        texts = [tokenizer(prompt + answer)["input_ids"] for answer in answers]
        width, start = max(map(len, texts)), len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        real = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        with torch.no_grad():
            chances = model(ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
        found = -chances.gather(2, ids[:, 1:, None])[..., 0].numpy()
        return [(row[: len(t) - 1], len(t) - start) for row, t in zip(found, texts, strict=True)]

    return [nats(question.prompts[0], question.answers) for question in questions]


DEFINITIONS = {
    "answer_mean": lambda nats, own, length: nats[-own:].mean(),
    "text_mean": lambda nats, own, length: nats.mean(),
    "sum": lambda nats, own, length: nats[-own:].sum(),
    "char": lambda nats, own, length: nats[-own:].sum() / length,
}


@pytest.mark.parametrize("score", scoring.SCORES)
def test_scores(questions, theirs, tokenizer, smollm, root, score, agree, report):
    questions, theirs = questions[: ROWS[score]], theirs[: ROWS[score]]
    asked = items.items(questions, tokenizer, score=score, style="plain", context=2048)
    run = devices.spread(scoring.score, smollm.config, smollm.weights, "one")
    planned = batches.plan(asked, tokens=1024, program=20_000)
    [found] = compare.measure(run, compare.stacks([{}]), planned, "scoring")
    ours = [scores[: len(q.answers)] for scores, q in zip(found, questions, strict=True)]
    right = [
        [DEFINITIONS[score](*pair, length) for pair, length in zip(row, q.lengths, strict=True)]
        for row, q in zip(theirs, questions, strict=True)
    ]
    what = f"{len(questions)} rows of {'ARC-easy' if root == DATA else 'our own'}"
    agree(f"scores, {score}, {what}", np.concatenate(ours), np.concatenate(right), 1e-3)
    choices = [(int(np.argmin(a)), int(np.argmin(b))) for a, b in zip(ours, right, strict=True)]
    label = np.array([q.label for q in questions])
    accuracy = [np.mean(np.array(side) == label) for side in zip(*choices, strict=True)]
    assert all(a == b for a, b in choices)
    report(f"accuracy by {score}, {what}: {accuracy[0]:.2f} here, {accuracy[1]:.2f} there")

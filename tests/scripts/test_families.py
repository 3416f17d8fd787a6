"""The three commands on a small random model of every family: train, compose, evaluate.

A family joins by a row.
"""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose import cli as compose
from eval import cli as evaluate
from lora_jax import checkpoint, models, peft, tokens
from lora_jax.families import gemma3, gpt2, llama, phi, phi3
from lora_jax.rope import Rope
from train import cli as train

FAMILIES = {
    "llama": llama.Config("llama", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), tied=True),
    "mistral": llama.Config("mistral", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), window=16),
    "qwen2": llama.Config("qwen2", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), qkv_bias=True),
    "gpt2": gpt2.Config(264, 32, 64, 2, 4, 128),
    "phi": phi.Config(264, 32, 64, 2, 4, 4, 128, Rope(4)),
    "qwen3": llama.Config("qwen3", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), qk_norm=True),
    "phi3": phi3.Config(264, 32, 64, 2, 4, 2, 8, 128, Rope(8)),
    "gemma3": gemma3.Config(
        264, 32, 64, 2, 4, 1, 8, 128, (True, False), Rope(8), Rope(8), window=16, query_scalar=8
    ),
}
QUESTIONS = [
    {"question": f"Where is the {n * 'very '}deep sea?", "choices": ["here", "over there", "no"]}
    for n in range(3)
]
pytestmark = pytest.mark.slow
SHORT = (
    "--steps 2 --batch 2 --length 32 --pack --rank 2 --learning-rate 3e-2 "
    "--validation 0 --checkpoint-every 0"
)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory, base_folder, random_weights, call, rows_file):
    """A base model, a module trained on it for two steps, and a composition of it."""
    config, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    weights = random_weights(config)
    checkpoint.save_model(folder / "base", config, weights)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / file, folder / "base" / file)
    sums = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}"} for n in range(6)]
    data = rows_file(folder / "sums.jsonl", sums)
    base = ("--base", folder / "base")
    call(train, data, "--out", folder / "a", *base, *SHORT.split())
    named = (f"a={folder}/a", f"b={folder}/a")
    call(compose, "a - 0.4*b", *named, *base, "--out", folder / "c")
    return SimpleNamespace(folder=folder, config=config, weights=weights)


def test_training_leaves_a_module_of_the_familys_targets(made):
    record = json.loads((made.folder / "a" / "training.json").read_text())
    assert record["finished"] and record["steps"] == 2
    adapter = peft.load_adapter(made.folder / "a", made.config)
    assert tuple(adapter) == models.default_targets(made.config)
    assert all(jnp.abs(module.b).max() > 1e-3 for module in adapter.values())


def test_composing_does_what_it_says(made):
    one, other = (peft.load_adapter(made.folder / name, made.config) for name in "ac")
    assert one.keys() == other.keys()
    for path, whole in one.items():
        part = other[path]
        want = 0.6 * whole.scale * whole.a @ whole.b
        np.testing.assert_allclose(part.scale * part.a @ part.b, want, atol=1e-5)


def test_evaluating_gives_every_column_what_one_text_at_a_time_gives(made, hidden, call, rows_file):
    folder = made.folder
    rows_file(folder / "rows.jsonl", [row | {"label": 1} for row in QUESTIONS])
    task = {"rows": "rows.jsonl", "prompt": "{question} ->", "choices": "choices"}
    (folder / "task.json").write_text(json.dumps(task))
    call(
        evaluate,
        *("--base", folder / "base", "--data-root", folder, "--out", folder / "results"),
        *("--task-file", folder / "task.json", "--generate", "Hi", "--max-new-tokens", "3"),
        *("--adapters", f"a={folder}/a", f"c={folder}/c"),
    )
    found = json.loads((folder / "results" / "results.json").read_text())
    assert [line["column"] for line in found["numbers"]][:3] == ["base", "a", "c"]
    tokenizer = tokens.load_tokenizer(folder / "base")
    adapter = peft.load_adapter(folder / "a", made.config)
    for row, example in zip(QUESTIONS, found["tasks"][0]["examples"], strict=True):
        scores = example["scores"]
        for name, module in {"base": {}, "a": adapter}.items():
            alone = [
                nats(made, hidden, module, tokenizer, f"{row['question']} ->", f" {choice}")
                for choice in row["choices"]
            ]
            np.testing.assert_allclose(scores[name], alone, atol=1e-4)
        assert not np.allclose(scores["base"], scores["a"], atol=1e-3)


def nats(made, hidden, adapter, tokenizer, prompt, answer):
    """The mean negative log-likelihood of an answer's tokens, by a plain forward of its text."""
    start, ids = (len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"])
    padded = np.zeros((1, 64), np.int32)  # a pad comes after all that could see it
    padded[0, : len(ids)] = ids
    states = hidden(made.config, made.weights, adapter, padded)
    chances = jax.nn.log_softmax(models.unembed(made.config, made.weights, {}, states))[0]
    return -np.asarray(chances)[np.arange(start - 1, len(ids) - 1), ids[start:]].mean()

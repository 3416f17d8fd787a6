"""Labelled texts under a classifier: every label's nats, batches, and whole runs of the command."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from eval import classify, compare
from eval.catalogue import TASKS
from eval.config import Evaluation
from eval.run import run
from eval.tasks import Classification, Corpus, read_any, read_task
from lora_jax import bases, models, peft
from lora_jax.errors import InputError
from lora_jax.labelled import Form
from lora_jax.modules import Saved
from lora_jax.rows import Row


@pytest.fixture(scope="session")
def base(classifier_folder):
    """The tiny classifier, with a new head of two labels."""
    return bases.load_base(str(classifier_folder))


@pytest.fixture
def adapter(base, random_lora):
    """A LoRA with a head of its own, neither of them zero."""
    head = {path: base.weights[path] for path in models.head_paths(base.config)}
    step = {path: 0.3 * (1 + np.arange(value.shape[-1])) for path, value in head.items()}
    moved = {path: Saved(value + step[path]) for path, value in head.items()}
    return random_lora(base.config, targets=["query", "value"]) | moved


@pytest.fixture
def write(tmp_path):
    """A function that writes a task's rows and its file, and gives back the file's path."""

    def write(rows, /, **fields) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "mood.json"
        path.write_text(json.dumps({"kind": "classification", "rows": "rows.jsonl", **fields}))
        return path

    return write


IDS = [[5, 6, 7], [5] * 30, [9], [8, 7, 6, 5], [4] * 20, [3, 4]]


def test_every_text_is_in_one_batch_and_gets_its_own_labels(base, adapter):
    """Whatever it is batched with: as it is alone."""
    program = jax.jit(classify.label_nll, static_argnums=0)
    found = {}
    for indices, texts in classify.plan(IDS, tokens=64, multiple=2):
        assert len(texts.tokens) % 2 == 0
        nll = program(base.config, base.weights, adapter, texts)
        found |= dict(zip(indices.tolist(), nll, strict=False))
    assert sorted(found) == list(range(len(IDS)))

    @jax.jit
    def alone(ids):
        states = models.forward(base.config, base.weights, adapter, ids[None]).hidden
        return -jax.nn.log_softmax(models.classify(base.config, base.weights, adapter, states)[0])

    for n, ids in enumerate(IDS):
        np.testing.assert_allclose(found[n], alone(np.array(ids)), atol=1e-5)


def test_batches_hold_about_as_many_tokens_as_asked():
    planned = classify.plan(IDS * 10, tokens=120)
    assert all(texts.tokens.size <= 160 for _, texts in planned)
    assert len({texts.tokens.shape for _, texts in planned}) <= 4


def test_a_row_is_a_question_whose_choices_are_the_labels():
    task = Classification("t", "f", form=Form("{q}", label="gold"), group="kind")
    row = Row({"q": "hot?", "gold": "yes", "kind": "a"}, "here")
    text, question = classify.labelled(task, row, ("no", "yes"))
    assert text.texts == ("hot?",) and question.answers == ("no", "yes")
    assert (question.label, question.group, question.where) == (1, "a", "here")


def test_a_task_file_of_labelled_rows_is_read(write, tmp_path):
    path = write([], prompt="{a}", second="{b}", label="gold", labels=["x", "y"], group="g")
    wanted = Form("{a}", "{b}", "gold")
    rows = str(tmp_path / "rows.jsonl")
    assert read_any(path) == Classification("mood", rows, ("x", "y"), wanted, group="g")
    assert read_any(write([])) == Classification("mood", rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 3}, "rows must be a string; it is 3"),
        ({"label": ["a"]}, "label must be a string"),
        ({"labels": "yes no"}, "labels must be a list of names; it is 'yes no'"),
        ({"labels": [0, 1]}, "labels must be a list of names"),
        ({"choices": ["a", "b"]}, "unknown key 'choices'"),
    ],
)
def test_a_bad_file_of_labelled_rows_is_refused(write, fields, message):
    with pytest.raises(InputError, match=f"mood.json: {message}"):
        read_any(write([], **fields))


def test_another_file_is_a_choice(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"rows": "r.jsonl", "prompt": "{q}", "choices": "c"}))
    assert read_any(path) == read_task(path)


def test_glue_reads_its_hub_rows():
    samples = {
        "glue_sst2": ({"sentence": "s", "label": 1}, ("s",), "positive"),
        "glue_mnli": ({"premise": "p", "hypothesis": "h", "label": 2}, ("p", "h"), "contradiction"),
        "glue_qnli": ({"question": "q", "sentence": "s", "label": 0}, ("q", "s"), "entailment"),
        "glue_qqp": ({"question1": "a", "question2": "b", "label": 1}, ("a", "b"), "duplicate"),
        "glue_rte": ({"sentence1": "a", "sentence2": "b", "label": 0}, ("a", "b"), "entailment"),
    }
    for name, (fields, texts, label) in samples.items():
        task = TASKS[name]
        found, question = classify.labelled(task, Row(fields, ""), task.labels)
        assert found.texts == texts and question.answers[question.label] == label


def test_tasks_of_unlike_labels_are_measured_apart():
    glue = [TASKS[name] for name in ("glue_rte", "glue_qnli")]
    assert classify.common_labels([Corpus("a", "a"), *glue]) == ("entailment", "not_entailment")
    with pytest.raises(InputError, match="glue_rte and glue_mnli have different labels"):
        classify.common_labels([glue[0], TASKS["glue_mnli"]])


TEXTS = ["hot", "cold", "a", "", "x y"] * 4
ROWS = [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)]


@pytest.fixture
def evaluate(classifier_folder, tmp_path):
    """A function that runs the command and gives back its document."""

    def go(**settings):
        out = tmp_path / "out"
        run(Evaluation(base=str(classifier_folder), out=out, overwrite=True, **settings))
        return json.loads((out / "results.json").read_text())

    return go


def test_columns_have_accuracies_intervals_and_differences(
    base, adapter, write, evaluate, tmp_path, capsys
):
    peft.save_adapter(tmp_path / "a", adapter, base.config)
    found = evaluate(
        task_file=(write(ROWS, labels=["no", "yes"]),),
        adapters=(f"a={tmp_path / 'a'}",),
        compare=("base", "a", "half=0.5*a"),
    )
    one, a, half = found["numbers"]
    assert one["metric"] == "accuracy" and one["examples"] == 20 and one["difference"] is None
    assert a["value"]["low"] <= a["value"]["value"] <= a["value"]["high"]
    examples = found["tasks"][0]["examples"]
    right = [np.argmin(e["scores"]["a"]) == e["label"] for e in examples]
    assert a["value"]["value"] == np.mean(right)
    assert a["difference"]["value"] == pytest.approx(a["value"]["value"] - one["value"]["value"])
    for column in ("base", "a", "half"):
        chances = np.exp(-np.array([e["scores"][column] for e in examples]))
        np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-4)
    assert half["column"] == "half" and "mood" in capsys.readouterr().out


@pytest.mark.parametrize("devices", ["pmap", "one"])
def test_devices_agree(write, evaluate, devices):
    task = (write(ROWS),)
    one, other = evaluate(task_file=task), evaluate(task_file=task, devices=devices)
    for x, y in zip(one["tasks"][0]["examples"], other["tasks"][0]["examples"], strict=True):
        np.testing.assert_allclose(x["scores"]["base"], y["scores"]["base"], rtol=1e-5)


def test_what_cannot_be_asked_is_refused_by_name(
    base, adapter, base_folder, write, evaluate, tmp_path
):
    words = r"kind classifier: 'wikitext' asks for .*; --generate asks"
    with pytest.raises(InputError, match=words):
        evaluate(tasks=("wikitext",), generate=("Hello",))
    last = "classifier.out_proj"
    three = {last: Saved(np.ones((32, 3))), f"{last}.bias": Saved(np.ones(3))}
    peft.save_adapter(tmp_path / "three", adapter | three, base.config)
    with pytest.raises(InputError, match=r"three tells 3 labels apart and mood has 2 \(LABEL_0,"):
        evaluate(task_file=(write(ROWS),), adapters=(f"three={tmp_path / 'three'}",))
    settings = {"base": str(base_folder), "out": tmp_path / "out"}
    with pytest.raises(InputError, match="labels are a classifier's; this base model is causal"):
        run(Evaluation(task_file=(write(ROWS, labels=["a", "b"]),), **settings))
    with pytest.raises(InputError, match="kind causal: 'mood' has labels; take a classifier"):
        run(Evaluation(task_file=(write(ROWS),), **settings))


def test_columns_with_heads_share_a_program_and_none_is_copied_for_another(adapter):
    plain = {path: m for path, m in adapter.items() if not isinstance(m, Saved)}
    found = compare.stacks([{}, adapter, plain, adapter])
    heads = {
        frozenset(stack.columns): any(isinstance(m, Saved) for m in stack.adapters.values())
        for stack in found
    }
    assert heads == {frozenset({0, 2}): False, frozenset({1, 3}): True}

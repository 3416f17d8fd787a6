"""Outcomes become numbers with intervals, and a document that JSON can hold."""

import io
import json

import numpy as np
import pytest

from eval import report, results
from eval.prompts import Question


@pytest.fixture
def answers():
    """Ten questions of two groups: the base is right on five, the module on eight."""
    questions = [
        Question(("p",) * 2, ("a", "b"), (1, 1), 0, "xy"[n % 2], f"f line {n}") for n in range(10)
    ]
    right, wrong = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    scores = {
        "base": [right if n < 5 else wrong for n in range(10)],
        "module": [right if n < 8 else wrong for n in range(10)],
    }
    return results.Answers("t", "nowhere.jsonl", questions, scores)


@pytest.fixture
def perplexity():
    nats = {"base": np.array([20.0, 10.0]), "module": np.array([10.0, 10.0])}
    return results.Perplexity("text", "nowhere.txt", nats, np.array([10, 5]))


def test_accuracy_and_its_paired_difference(answers):
    base, module = results.lines(answers)
    assert base.value.value == 0.5 and base.difference is None
    assert module.value.value == 0.8
    assert module.difference.value == pytest.approx(0.3)
    assert module.difference.low >= 0  # the module is never worse


def test_accuracy_by_group(answers):
    assert results.by_group(answers) == {
        "x": {"base": 0.6, "module": 0.8},
        "y": {"base": 0.4, "module": 0.8},
    }


def test_nats_a_token_are_of_all_tokens(perplexity):
    base, module = results.lines(perplexity)
    assert base.value.value == 2.0 and base.examples == 15
    assert module.difference.value == pytest.approx(-10 / 15)


def test_the_document_holds_every_score(answers, perplexity):
    outcomes = [answers, perplexity]
    numbers = [line for outcome in outcomes for line in results.lines(outcome)]
    found = json.loads(json.dumps(results.document(outcomes, numbers, None, {"seed": 0})))
    example = found["tasks"][0]["examples"][5]
    assert example["scores"] == {"base": [2.0, 1.0], "module": [1.0, 2.0]}
    assert example["where"] == "f line 5" and example["label"] == 0
    assert found["tasks"][1]["perplexity"]["base"] == pytest.approx(np.exp(2.0))
    assert found["provenance"] == {"seed": 0} and found["replies"] == {}


def test_tables_and_chart_show_every_column(answers, perplexity, tmp_path):
    from rich.console import Console

    numbers = [*results.lines(answers), *results.lines(perplexity)]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.table(numbers))
    console.print(report.group_table("t", results.by_group(answers)))
    console.print(report.reply_table(results.Replies(["hi"], {"base": ["ho"]})))
    text = console.export_text()
    for shown in ("50.0 %", "+30.0", "7.39 ppl", "-48.66 %", "ho"):
        assert shown in text
    report.chart(numbers, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_perplexity_beyond_floats_is_null():
    huge = results.Perplexity("text", "nowhere.txt", {"base": np.array([1e4])}, np.array([10]))
    numbers = results.lines(huge)
    found = results.document([huge], numbers, None, {})
    assert json.loads(json.dumps(found, allow_nan=False))["tasks"][0]["perplexity"] == {
        "base": None
    }
    assert report.table(numbers).row_count == 2

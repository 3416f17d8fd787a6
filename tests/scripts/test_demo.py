import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval.results import Line
from eval.statistics import Interval
from eval.tasks import read_task
from lora_jax.bases import Base
from scripts.demo import __main__, report, tasks
from scripts.demo.stages import Demo, Routing, Sweep, Trained, Unlearning, _exclaimed


def words(question: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}|\d+", question.lower()))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_label_names_a_choice_and_every_choice_is_right_sometimes(name):
    drawn = list(tasks.questions(name, 200, held_out=False))
    places = {question["label"] for question in drawn}
    assert places == set(range(len(drawn[0]["choices"])))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_held_out_questions_are_decided_by_words_never_trained_on(name):
    train = [q["question"] for q in tasks.questions(name, 400, held_out=False)]
    test = [q["question"] for q in tasks.questions(name, 400, held_out=True)]
    frame = set.intersection(*map(words, train + test)) | set(tasks.WORDS["things"])
    seen = set().union(*map(words, train)) - frame
    assert not seen & (set().union(*map(words, test)) - frame)


def test_the_past_tense_is_spelled_right():
    forms = {verb: tasks._past(verb) for verb in ("walk", "close", "carry", "jog", "enjoy")}
    assert list(forms.values()) == ["walked", "closed", "carried", "jogged", "enjoyed"]


def test_data_depends_on_the_seed_alone(tmp_path):
    for name in ("one", "two"):
        tasks.write_files(tmp_path / name, train=5, test=3)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 3 * len(tasks.TASKS) + 4
    assert all(f.read_bytes() == (tmp_path / "two" / f.name).read_bytes() for f in files)
    tasks.write_files(tmp_path / "other", train=5, test=3, seed=1)
    rows = [tmp_path / name / "kind-train.jsonl" for name in ("one", "other")]
    assert rows[0].read_text() != rows[1].read_text()


def test_the_data_alone_take_no_base_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--only-data", "--train", "5", "--out", str(tmp_path)])
    __main__.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "data")
    task = read_task(tmp_path / "data" / "kind.json")
    assert Path(task.file) == tmp_path / "data" / "kind-test.jsonl"
    assert len((tmp_path / "data" / "kind-train.jsonl").read_text().splitlines()) == 5


def test_exclaimed_is_a_share_of_sentences():
    assert _exclaimed(["Yes! It is. Really?", "Wow!!"]) == 0.5
    assert _exclaimed(["no end"]) == 0


def line(task: str, column: str, value: float) -> Line:
    shown = Interval(value, value - 0.1, value + 0.1)
    return Line(task, column, "accuracy", 48, shown, shown if column != "base" else None)


def test_the_report_is_one_page_that_needs_nothing_and_escapes_what_the_model_wrote(tmp_path):
    record = {
        "config": {"kind": "lora"},
        "examples": 9,
        "steps": 2,
        "seconds": 1.5,
        "validation_loss": None,
        "metrics": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
    }
    sweep = Sweep(
        "mood",
        "kind",
        [0.0, 1.0],
        {
            space: {task: [line(task, "x", 0.2), line(task, "x", 0.8)] for task in ("mood", "kind")}
            for space in ("factor", "delta")
        },
    )
    points = [Unlearning("cheers", s, 0.5 + s / 2, 20.0, "<script>!") for s in (0.0, -1.0)]
    lines = {t: [line(t, c, 0.5) for c in ("base", "Arrow")] for t in ("mood", "kind")}
    shares = {t: np.full((3, 2), 0.5) for t in lines}
    demo = Demo(Base(None, {}, tmp_path / "smollm"), None, tmp_path, 0)
    path = report.write(
        demo,
        Trained({}, {"mood": record}),
        sweep,
        points,
        Routing(lines, shares, dict.fromkeys(lines, 0.5)),
        12.0,
    )
    page = path.read_text()
    assert page.count("<svg") == 5
    assert "<script>" not in page and "&lt;script&gt;!" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert "+0.50 [+0.40, +0.60]" in page


def test_the_words_of_the_demo_are_plain_json():
    assert json.loads((tasks.HERE / "words.json").read_text()) == tasks.WORDS

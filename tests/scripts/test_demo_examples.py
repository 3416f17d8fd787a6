import json

import pytest

from eval.tasks import read_task
from scripts.demo import examples, tasks
from train.config import Config


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    tasks.write_files(tmp_path, train=192, test=48)
    examples.write_files(tmp_path)
    return tmp_path


def test_the_halves_of_a_task_share_no_word_and_are_its_rows(folder):
    first, second = (rows(folder / f"kind-{name}.jsonl") for name in ("first", "second"))
    assert not {r["question"] for r in first} & {r["question"] for r in second}
    whole = rows(folder / "kind-train.jsonl")
    assert sorted(map(str, first + second)) == sorted(map(str, whole))
    assert min(len(first), len(second)) > len(whole) / 3
    assert {row["label"] for row in first} == {row["label"] for row in second} == {0, 1, 2, 3}


def test_the_new_domain_is_tested_on_words_that_no_text_has(folder):
    seen = (folder / "people.txt").read_text() + (folder / "mood-train.jsonl").read_text()
    for row in rows(folder / "people-test.jsonl"):
        first, second = row["question"].removesuffix(". Card:").split(" was ")[1].split(" and ")
        assert first not in seen and second not in seen
        side = ("praised", "blamed")[row["label"]]
        assert {first, second} <= set(tasks.WORDS[side])


def test_a_card_means_the_same_of_people_as_of_products(folder):
    praise = next(r for r in rows(folder / "people-test.jsonl") if "kind" in r["question"])
    assert praise["choices"][praise["label"]] == "blue"
    product = next(r for r in rows(folder / "mood-train.jsonl") if "superb" in r["question"])
    assert product["choices"][product["label"]] == "blue"


def test_the_calm_reply_is_the_right_one_and_its_topic_is_new(folder):
    trained = (folder / "assistant.jsonl").read_text()
    for row in rows(folder / "manners-test.jsonl"):
        assert ["!" in choice for choice in row["choices"]] == [True, False] and row["label"] == 1
        assert row["question"] not in trained


def test_the_task_files_and_the_runs_are_readable(folder):
    for name in ("people", "manners"):
        assert read_task(folder / f"{name}.json").file.endswith(f"{name}-test.jsonl")
    for run in examples.runs(folder).values():
        data = folder / run["data"]
        assert data.exists()
        Config(**run | {"data": (str(data),), "out": folder / "x"})


def test_without_a_demo_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["examples", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none has no demo in it; run `make demo` first"):
        examples.main()

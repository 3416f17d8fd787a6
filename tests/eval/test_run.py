"""A run refuses early, leaves nothing half done, and records what it did."""

import json

import pytest

from eval import bench as benches
from eval.config import Evaluation
from eval.run import run
from lora_jax import bases, peft
from lora_jax.errors import InputError

ROW = {"question": "q", "choices": ["a", "b"], "label": 0}


@pytest.fixture
def root(tmp_path):
    """A data root with one task of the catalogue, a task file and two texts of one name."""
    for folder in ("arc_easy", "more"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "some.txt").write_text("A text that is long enough to be read.")
    (tmp_path / "arc_easy" / "test.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    task = {"rows": "arc_easy/test.jsonl", "prompt": "{question}", "choices": "choices"}
    (tmp_path / "arc_easy.json").write_text(json.dumps(task))
    return tmp_path


@pytest.fixture
def settings(root, base_folder):
    """A function from changes to the settings of a small run in the data root."""

    def make(**changes) -> Evaluation:
        common = {"base": str(base_folder), "data_root": root, "out": root / "out"}
        return Evaluation(**common | {"tasks": ("arc_easy",)} | changes)

    return make


def result(settings):
    return json.loads((settings.out / "results.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("arc_eazy",)}, "unknown task 'arc_eazy'"),
        ({"tasks": ()}, "nothing to measure"),
        ({"task_file": ("arc_easy.json",)}, "task 'arc_easy' is given twice"),
        ({"text": ("arc_easy/some.txt", "more/some.txt")}, "task 'some' is given twice"),
        ({"task_file": ("nowhere.json",)}, "nowhere.json"),
        ({"adapters": ("a",)}, "'a' is not NAME=FOLDER"),
        ({"adapters": ("base=x",)}, "the name 'base' is taken"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"out": "arc_easy"}, "arc_easy exists; choose another --out"),
        ({"out": "arc_easy", "overwrite": True}, "arc_easy"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_loaded(
    settings, root, monkeypatch, changes, message
):
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("the base was loaded"))
    if "out" in changes:
        changes["out"] = root / changes["out"]
    for key in {"task_file", "text"} & changes.keys():
        changes[key] = tuple(root / path for path in changes[key])
    with pytest.raises(InputError, match=message):
        run(settings(**changes))
    assert not (root / "out").exists() and (root / "arc_easy" / "test.jsonl").exists()


def test_a_task_file_may_be_on_the_hub(settings, root, hub):
    fetched = hub(root)
    run(settings(tasks=(), task_file=("hf://datasets/ann/tasks/arc_easy.json@v2",)))
    assert fetched == [["arc_easy.json"]]
    assert result(settings())["tasks"]


def test_a_failure_leaves_no_folder_and_the_earlier_result(settings, monkeypatch):
    run(settings())
    earlier = result(settings())
    monkeypatch.setattr(benches, "answers", lambda *_: pytest.fail("went wrong"))
    for changes in ({"out": settings().out / "new"}, {"overwrite": True}):
        with pytest.raises(pytest.fail.Exception, match="went wrong"):
            run(settings(**changes))
    assert not (settings().out / "new").exists() and result(settings()) == earlier


def test_the_record_holds_the_settings_and_what_was_measured(settings, base_folder, capsys):
    made = settings(generate=("Hi",), max_new_tokens=2, limit=1)
    run(made)
    found = result(made)
    kept = found["provenance"]["settings"]
    assert kept["data_root"] == str(made.data_root) and kept["tasks"] == ["arc_easy"]
    assert kept["max_new_tokens"] == 2 and kept.keys() == vars(made).keys()
    assert found["provenance"]["base"]["name"] == str(base_folder)
    assert found["provenance"]["seconds"] > 0 and found["provenance"]["columns"] == {"base": "base"}
    assert [(line["task"], line["examples"]) for line in found["numbers"]] == [("arc_easy", 1)]
    assert found["replies"]["prompts"] == ["Hi"] and len(found["replies"]["replies"]["base"]) == 1
    shown = capsys.readouterr().out
    assert "arc_easy (1)" in shown and shown.splitlines()[-1] == str(made.out / "results.json")


def test_adapters_and_texts_come_from_the_hub(settings, root, config, random_lora, hub):
    peft.save_adapter(root / "mood", random_lora(config), config)
    hub(root)
    made = settings(
        tasks=(),
        adapters=("mood=hf://ann/tiny/mood",),
        text=("hf://datasets/ann/texts/more/some.txt",),
        window=16,
        stride=8,
    )
    run(made)
    found = result(made)
    assert {line["task"] for line in found["numbers"]} == {"some"}
    assert found["tasks"][0]["sha256"] and found["provenance"]["columns"]["mood"] == "mood"
    assert found["provenance"]["adapters"]["mood"]["path"] == str(root / "mood")


def test_a_text_alone_has_no_chart_and_a_run_again_the_same_numbers(settings, root):
    text = {"tasks": (), "text": (root / "more" / "some.txt",), "window": 16, "stride": 8}
    once, again = (settings(**text, out=root / name) for name in ("once", "again"))
    for made in (once, again):
        run(made)
    assert [path.name for path in once.out.iterdir()] == ["results.json"]
    assert result(once)["numbers"] == result(again)["numbers"]
    assert result(once)["numbers"][0]["metric"] == "nats_per_token"

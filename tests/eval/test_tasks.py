"""Tasks say what they need, and a user's task file is held to its fields."""

import json

import pytest

from eval.catalogue import TASKS
from eval.tasks import Form, Task, find, read_task
from lora_jax.errors import InputError


def test_the_papers_benchmarks_are_there():
    names = "boolq piqa hellaswag swag arc_easy arc_challenge openbookqa winogrande bbh wikitext"
    translated = [
        f"{task}_{lang}"
        for task in ("xnli", "m_arc", "m_hellaswag", "m_mmlu")
        for lang in ("de", "fr")
    ]
    assert {*names.split(), *translated, "xnli_en"} <= TASKS.keys()
    assert all(find(name).name == name for name in TASKS)


def test_bbh_has_its_23_choice_tasks():
    assert len(set(find("bbh").hub.configs)) == 23


def test_every_task_has_a_file_a_hub_set_and_both_forms():
    for task in TASKS.values():
        assert task.hub and "/" in task.file
        if isinstance(task, Task):
            assert all(task.form(style).needs() for style in ("plain", "chat"))


def test_an_unknown_task_is_refused_with_the_known():
    with pytest.raises(InputError, match="unknown task 'arc'; choose from boolq, piqa"):
        find("arc")


def test_a_form_needs_the_fields_it_names():
    assert Form("{q} of {p}:", " {choice}", "options").needs() == {
        "q": "prompt",
        "p": "prompt",
        "options": "choices",
    }
    assert Form("", "{before}{choice}{after}", ("a", "b")).needs() == {"question": "answer"}


@pytest.fixture
def write(tmp_path):
    def write(**fields):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(fields))
        return path

    return write


def test_a_task_file_is_read(write, tmp_path):
    path = write(rows="r.jsonl", prompt="{text}\nMood:", choices=["good", "bad"], group="kind")
    plain = Form("{text}\nMood:", " {choice}", ("good", "bad"))
    chat = Form("{text}\nMood:", "{choice}", ("good", "bad"))
    want = Task("mine", str(tmp_path / "r.jsonl"), plain, chat, group="kind", where=str(path))
    assert read_task(path) == want


def test_a_tasks_rows_may_be_on_the_hub(write):
    rows = "hf://datasets/ann/rows/r.jsonl@v1"
    assert read_task(write(rows=rows, prompt="{text}", choices="c")).file == rows


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rows": "r", "choices": "c"}, "mine.json: prompt is missing"),
        ({"rows": "r", "prompt": "p", "choices": "c", "anwser": "a"}, "unknown key 'anwser'"),
        ({"rows": "r", "prompt": 3, "choices": "c"}, "prompt must be a string; it is 3"),
        ({"rows": "r", "prompt": "{", "choices": "c"}, "prompt is not a template"),
        ({"rows": "r", "prompt": "p", "choices": ["one"]}, "at least two words"),
    ],
)
def test_a_wrong_task_file_is_refused(write, fields, message):
    with pytest.raises(InputError, match=message):
        read_task(write(**fields))

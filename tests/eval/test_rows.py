"""Rows come whole, from a file or the hub, and a bad one is named by its file and line."""

import pytest

from eval import hub, rows
from eval.rows import load_rows, load_text
from eval.tasks import Corpus, Form, Hub, Task
from lora_jax.errors import InputError

FORM = Form("{question}")
GOOD = '{"question": "q", "choices": ["a", "b"], "label": 0}\n'


@pytest.fixture
def root(tmp_path):
    """A function that writes a task's file and gives the data root."""

    def write(text: str):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "test.jsonl").write_text(text)
        return tmp_path

    return write


def task(**options) -> Task:
    return Task("t", "t/test.jsonl", FORM, FORM, **options)


def test_rows_know_their_line(root):
    found = load_rows(task(), FORM, root(GOOD + "\n" + GOOD))
    assert [row.place.rpartition("/")[2] for row in found] == [
        "test.jsonl line 1",
        "test.jsonl line 3",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + '{"question": "q", "label": 1}', r"test.jsonl line 2 lacks 'choices'; it has que"),
        (GOOD + "{oops", "test.jsonl line 2 is not valid JSON"),
        ("[1]\n", "line 1 must hold a JSON object"),
        ("\n", "holds no rows for task 't'"),
        ('{"question": "q", "choices": ["a", "b"], "label": null}', "lacks 'label'"),
    ],
)
def test_bad_rows_are_refused(root, text, message):
    with pytest.raises(InputError, match=message):
        load_rows(task(), FORM, root(text))


def test_a_field_that_a_task_file_wants_is_told_with_its_key_and_the_placeholders(root):
    form = Form("{question}", " {answer}")
    told = r"lacks 'answer'; .*; answer of mine.json wants it; the placeholders are {question}"
    with pytest.raises(InputError, match=told + r", {choices}, {label}, {choice}$"):
        load_rows(task(where="mine.json"), form, root(GOOD))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match=r"test.jsonl does not exist; task 't' reads its rows"):
        load_rows(task(), FORM, tmp_path)


def test_rows_and_their_root_may_be_on_the_hub(root, hub):
    folder = root(GOOD)
    fetched = hub(folder)
    there = Task("t", "hf://datasets/ann/rows/t/test.jsonl", FORM, FORM)
    assert load_rows(there, FORM) == load_rows(there, FORM, folder / "nowhere")
    assert load_rows(task(), FORM, "hf://datasets/ann/rows") == load_rows(task(), FORM, folder)
    assert fetched == [["t/test.jsonl"]] * 3


def test_free_form_rows_are_left_out_where_they_may_be(root):
    text = GOOD + '{"question": "q", "choices": null, "label": null}\n'
    assert len(load_rows(task(open_ended=True), FORM, root(text))) == 1


def test_a_limit_draws_rows_by_the_seed_in_their_order(root):
    text = "".join(GOOD.replace('"q"', f'"{n}"') for n in range(50))
    draws = [
        [int(r.fields["question"]) for r in load_rows(task(), FORM, root(text), limit=9, seed=s)]
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(set(draws[0])) and len(draws[0]) == 9


def test_hub_rows_are_made_ours(monkeypatch):
    def split(name, config, **options):
        return [{"q": f"{config} {n}"} for n in range(2)]

    def ours(row):
        return {"question": row["q"], "choices": ["a", "b"], "label": 1, "task": row["config"]}

    monkeypatch.setattr(rows, "load_split", split)
    found = load_rows(task(hub=Hub("o/t", ("x", "y"), "test", ours)), FORM)
    assert [row.fields["question"] for row in found] == ["x 0", "x 1", "y 0", "y 1"]
    assert found[2].place == "o/t y test row 0"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"goal": "g", "sol1": "a", "label": 0}, r"row 0 lacks 'sol2'; it has goal, sol1, label"),
        ({"goal": "g", "sol1": "a", "sol2": "b", "label": ""}, r"row 0 has a field that cannot be"),
    ],
)
def test_hub_rows_of_another_form_are_refused(monkeypatch, fields, message):
    monkeypatch.setattr(rows, "load_split", lambda *names, **options: [fields])
    with pytest.raises(InputError, match=message):
        load_rows(task(hub=Hub("o/t", row=hub.piqa)), FORM)


def test_hub_texts_have_text(monkeypatch):
    monkeypatch.setattr(rows, "load_split", lambda *names, **options: [{"page": "p"}])
    with pytest.raises(InputError, match="row 0 lacks 'text'; it has page"):
        load_text(Corpus("c", "c.txt", Hub("o/t")))


def test_the_hub_out_of_reach_is_one_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"'o/t'.*\(no route to host\); pass --data-root DIR"):
        load_rows(task(hub=Hub("o/t")), FORM)


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "b.txt").write_text(" \n")
    assert load_text(Corpus("a", "a.txt"), tmp_path) == "Some text."
    with pytest.raises(InputError, match=r"b.txt is empty"):
        load_text(Corpus("b", "b.txt"), tmp_path)
    with pytest.raises(InputError, match=r"c.txt does not exist"):
        load_text(Corpus("c", "c.txt"), tmp_path)


def test_other_bytes_and_byte_order_marks(tmp_path, root):
    path = root("") / "t" / "test.jsonl"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_rows(task(), FORM, tmp_path)[0].fields["question"] == "q"
    for name, read in [("t/test.jsonl", load_rows), ("a.txt", load_text)]:
        (tmp_path / name).write_bytes(b"\xff\xfe")
        given = (task(), FORM) if read is load_rows else (Corpus("a", name),)
        with pytest.raises(InputError, match=f"{name} is not UTF-8"):
            read(*given, tmp_path)

"""Rows know where they came from; a file that is not what it should be is named with its line."""

import json

import pytest

from lora_jax.errors import InputError
from train.rows import read_rows, read_texts


def test_rows_come_in_order_with_their_places(write_rows):
    one = write_rows([{"n": 1}, "", {"n": 2}], "one.jsonl")
    two = write_rows([{"n": 3}], "two.jsonl")
    rows = read_rows((one, two))
    assert [row.fields["n"] for row in rows] == [1, 2, 3]
    assert [row.place for row in rows] == [f"{one} line 1", f"{one} line 3", f"{two} line 1"]


@pytest.mark.parametrize("bad", ["{", "[1]", "3", '{"n": 1} x'])
def test_a_bad_line_is_named(write_rows, bad):
    path = write_rows([{"n": 1}, bad])
    with pytest.raises(InputError, match=r"rows\.jsonl line 2"):
        read_rows((path,))


@pytest.mark.parametrize("read", [read_rows, read_texts])
def test_an_empty_data_set_is_refused(write_rows, read):
    with pytest.raises(InputError, match="the data set is empty"):
        read((write_rows([]),))


@pytest.mark.parametrize("read", [read_rows, read_texts])
@pytest.mark.parametrize("name", ["absent.jsonl", "absent.txt", "."])
def test_a_missing_file_is_named(read, name):
    with pytest.raises(InputError, match=rf"{name} is not a file"):
        read((name,))


def test_a_file_of_other_bytes_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl is not UTF-8"):
        read_rows((str(path),))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    path.write_text(json.dumps({"n": 1}), encoding="utf-8-sig")
    text.write_text("one", encoding="utf-8-sig")
    assert read_rows((str(path),))[0].fields == {"n": 1}
    assert read_texts((str(text),)) == ["one"]


def test_texts_come_from_lines_and_from_fields(tmp_path, write_rows):
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    rows = write_rows([{"text": "three"}])
    assert read_texts((str(tmp_path / "a.txt"), rows)) == ["one", "two", "three"]


def test_a_row_without_text_is_named(write_rows):
    path = write_rows([{"text": "one"}, {"body": "two"}])
    with pytest.raises(InputError, match=r'line 2: plain text needs a "text" field; it has body'):
        read_texts((path,))


def test_plain_text_is_no_task(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InputError, match="--objective language-model"):
        read_rows((str(tmp_path / "a.txt"),))


def test_files_on_the_hub_are_read_like_others(tmp_path, write_rows, hub):
    path = write_rows([{"text": "one"}])
    (tmp_path / "a.txt").write_text("two")
    fetched, address = hub(tmp_path), "hf://datasets/ann/rows"
    assert read_rows((f"{address}/rows.jsonl@v1",)) == read_rows((path,))
    assert read_texts((f"{address}/rows.jsonl", f"{address}/a.txt@v1")) == ["one", "two"]
    assert fetched == [["rows.jsonl"], ["rows.jsonl"], ["a.txt"]]
    with pytest.raises(InputError, match="--objective language-model"):
        read_rows((f"{address}/a.txt@v1",))


def test_the_hub_gives_rows_and_its_failures_one_line(monkeypatch):
    import datasets

    data = [{"n": 1}, {"n": 2}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("a/b", "test"): data}[name, split]
    )
    assert [r.place for r in read_rows(("hub:a/b:test",))] == [
        "hub:a/b:test row 0",
        "hub:a/b:test row 1",
    ]
    with pytest.raises(InputError, match="could not load hub:a/c from the hub"):
        read_rows(("hub:a/c",))

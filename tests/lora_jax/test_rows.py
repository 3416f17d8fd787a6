"""Rows know their file and line; whatever the hub does wrong is one error."""

import datasets
import pytest

from lora_jax.errors import InputError
from lora_jax.rows import Row, load_split, read_jsonl, read_lines


def test_rows_and_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n{"n": "é"}\n', encoding="utf-8-sig")
    assert list(read_jsonl(path)) == [
        Row({"n": 1}, f"{path} line 1"),
        Row({"n": "é"}, f"{path} line 3"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "line 1 is not valid JSON: "),
        (b"[1]", "line 1 must hold a JSON object; it holds a list"),
        (b"9" * 5000, "line 1 is not valid JSON: "),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text)
    with pytest.raises(InputError, match=rf"a\.jsonl {message}"):
        list(read_jsonl(path))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8-sig")
    assert list(read_lines(tmp_path / "a.txt")) == ["one\n", "two"]


def test_the_hub(monkeypatch):
    def load(*names, split):
        if split != "test":
            raise ConnectionError("no route\nand more")
        return [names]

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = {"told": "hub:o/t", "remedy": "give a file"}
    assert load_split("o/t", "c", split="test", **told) == [("o/t", "c")]
    expected = r"could not load hub:o/t from the hub \(no route\); give a file$"
    with pytest.raises(InputError, match=expected):
        load_split("o/t", split="train", **told)

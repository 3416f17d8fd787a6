import json

import pytest


def test_facts_are_shown_and_written_and_methods_named(command, folders, tmp_path, capsys):
    file = tmp_path / "facts.json"
    command("explain", f"x={folders / 'x'}", f"y={folders / 'y'}", "--json", file)
    said = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["names"] == ["x", "y"] and found["seeds"] == [0, 1] and found["width"] == 32
    assert f"{found['norms'][0]:.4g}" in said and f"{found['cosines'][0][1]:.3f}" in said
    assert "They do not share their initialisation" in said and "`" not in said
    assert found["words"][0].startswith("They do not share")


def test_a_library_counts_as_its_members(command, folders, tmp_path, capsys):
    command("explain", f"lib={folders / 'lib'}", "--json", tmp_path / "f.json")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["names"] == ["lib.x", "lib.y"] and found["seeds"] == [None, None]


@pytest.mark.parametrize("words", [("explain",), ("explain", "x")])
def test_no_modules_are_told(refused, words):
    assert "NAME=FOLDER" in refused(*words)


def test_a_file_is_not_replaced_unasked(command, refused, folders, tmp_path):
    file = tmp_path / "facts.json"
    file.write_text("mine")
    words = ("explain", f"x={folders / 'x'}", "--json", file)
    assert "exists" in refused(*words) and file.read_text() == "mine"
    command(*words, "--overwrite")
    assert json.loads(file.read_text())["names"] == ["x"]

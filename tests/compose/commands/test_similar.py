import json

import numpy as np

from compose.inputs import load_input
from compose.library import Library
from compose.similarity import similarity


def three(folders):
    return [f"{name}={folders / name}" for name in ("x", "y", "near")]


def test_the_matrix_is_shown_written_and_drawn(command, folders, tmp_path, config, capsys):
    out = tmp_path / "out"
    command("similar", *three(folders), "--out", out)
    said = capsys.readouterr().out
    adapters = tuple(load_input(folders / name, config) for name in ("x", "y", "near"))
    want = similarity(Library(("x", "y", "near"), adapters))
    found = json.loads((out / "similarity.json").read_text())
    np.testing.assert_allclose(found["overall"], want.overall, atol=1e-6)
    assert found["projections"].keys() == want.projections.keys() and found["measure"] == "cosine"
    assert (out / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert f"{want.overall[0, 1]:+.3f}" in said and said.splitlines()[-1] == str(out)


def test_neighbours_of_one_come_nearest_first(command, folders, capsys):
    command("similar", *three(folders), "--to", "x", "--measure", "input")
    said = capsys.readouterr().out
    assert said.index("near +") < said.index("y +") and "input" in said


def test_what_is_wrong_is_told_and_nothing_replaced(command, refused, folders, tmp_path):
    assert "did you mean near?" in refused("similar", *three(folders), "--to", "nears")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    assert "exists" in refused("similar", *three(folders), "--out", out)
    assert "not ours" in refused("similar", *three(folders), "--out", out, "--overwrite")
    (out / "similarity.json").touch()
    command("similar", *three(folders), "--out", out, "--overwrite")
    assert not (out / "mine").exists() and (out / "similarity.png").exists()

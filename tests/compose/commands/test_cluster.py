import json

import numpy as np
import pytest

from compose.arithmetic import average
from compose.inputs import load_input

Q = "self_attn.q_proj"


def test_groups_become_a_library_with_their_records(command, folders, tmp_path, config, capsys):
    out = tmp_path / "out"
    words = [folders / "x", folders / "y", f"close={folders / 'near'}"]
    command("cluster", *words, "--k", 2, "--out", out, "--method", "delta")
    means = load_input(out, config)
    assert means.names == ("cluster_1", "cluster_2") and means.routing is None
    x, near = (load_input(folders / name, config) for name in ("x", "near"))
    want = average([x, near], space="delta")[Q]
    np.testing.assert_allclose(means.adapters[0][Q].a, want.a, rtol=1e-6)
    found = json.loads((out / "clusters.json").read_text())
    groups = [(group["modules"], group["data"]) for group in found["clusters"]]
    assert groups == [(["x", "close"], ["x.jsonl", "near.jsonl"]), (["y"], ["y.jsonl"])]
    assert np.shape(found["similarity"]) == (3, 3) and found["method"] == "delta"
    lines = (out / "retrain.sh").read_text().splitlines()
    assert f"lora-train y.jsonl --out {tmp_path / 'out-trained' / 'cluster_2'}" in lines[-1]
    record = json.loads((out / "provenance.json").read_text())
    assert record["inputs"].keys() == {"x", "y", "close"} and "2 clusters" in record["expression"]
    assert (out / "similarity.png").exists()
    said = capsys.readouterr().out
    assert "x, close" in said and said.splitlines()[-1] == str(out)


def test_a_library_without_records_is_clustered_and_that_is_noted(
    command, folders, tmp_path, config, capsys
):
    out = tmp_path / "out"
    command("cluster", folders / "lib", "--k", 1, "--out", out, "--rank", 2)
    assert "no retrain.sh" in capsys.readouterr().err and not (out / "retrain.sh").exists()
    means = load_input(out, config)
    assert means.names == ("cluster_1",) and means.adapters[0][Q].a.shape[-1] == 2
    assert json.loads((out / "clusters.json").read_text())["clusters"][0]["data"] is None
    lost = json.loads((out / "provenance.json").read_text())["truncation_error"]
    assert 0 < lost["cluster_1"][Q][0] < 1


def test_what_is_wrong_leaves_nothing(refused, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "k must lie between 1 and the 2" in refused(
        "cluster", folders / "lib", "--k", 3, "--out", out
    )

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compose.commands.cluster.heat_map", full)
    assert "No space" in refused("cluster", folders / "x", folders / "y", "--k", 1, "--out", out)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_before_any_work(refused, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("compose.commands.cluster.given", lambda *_: pytest.fail("worked"))
    (tmp_path / "mine").touch()
    assert "exists" in refused("cluster", folders / "lib", "--k", 1, "--out", tmp_path)

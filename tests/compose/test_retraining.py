"""The runs that train one module for each cluster, from its members' records."""

import shlex
from dataclasses import replace

import numpy as np
import pytest

from compose.cluster import Clusters
from compose.retraining import retraining, script
from lora_jax.errors import InputError
from lora_jax.files import write_json
from train.cli import parse
from train.config import Config, Mixing, as_json

CLUSTERS = Clusters("delta", ("x", "y", "z"), (("x", "y"), ("z",)), np.eye(3), 0.0)


@pytest.fixture
def folders(tmp_path):
    """Records of three runs; x and y differ in their learning rate alone."""
    common = Config(
        data=("x.jsonl",),
        out=tmp_path / "x",
        prompt="Question: {question}\nAnswer:",
        completion=" {answer}",
        targets=("q_proj", "v_proj"),
        rslora=True,
        warmup=0.0,
    )
    runs = {
        "x": common,
        "y": replace(common, data=("y.jsonl", "x.jsonl"), learning_rate=1e-3, preset="pem-lora"),
        "z": replace(common, data=("z.txt",), validation_data=("v.txt",), objective="next-tokens"),
    }
    for name, config in runs.items():
        write_json(tmp_path / name / "training.json", {"config": as_json(config)})
    return {name: tmp_path / name for name in runs}


def test_the_command_is_a_run_on_all_data_with_the_settings_shared(folders, tmp_path):
    first, second = retraining(folders, CLUSTERS)
    assert (first.name, first.members) == ("cluster_1", ("x", "y"))
    assert first.data == ("x.jsonl", "y.jsonl") and first.differing == ("learning_rate",)
    words = shlex.split(first.command(tmp_path / "out"))
    assert words[0] == "lora-train"
    config = parse(words[1:])
    assert config.data == first.data and config.out == tmp_path / "out" / "cluster_1"
    assert config.prompt == "Question: {question}\nAnswer:" and config.completion == " {answer}"
    assert config.targets == ("q_proj", "v_proj") and config.rslora and config.warmup == 0
    assert config.learning_rate == Config(data=(), out=tmp_path).learning_rate and not config.preset
    assert second.differing == () and second.validation_data == ("v.txt",)
    config = parse(shlex.split(second.command(tmp_path))[1:])
    assert config.validation_data == ("v.txt",) and config.objective == "next-tokens"


def test_the_script_says_what_members_do_not_share(folders, tmp_path):
    told = script(retraining(folders, CLUSTERS), tmp_path).splitlines()
    assert told[0] == "#!/bin/sh" and told[4] == "# cluster_1: x, y"
    assert told[5] == "# its members differ in --learning-rate: at lora-train's defaults here"
    assert sum(line.startswith("lora-train ") for line in told) == 2


def test_rows_that_are_read_in_different_ways_are_not_trained_on_together(folders, tmp_path):
    mixed = replace(CLUSTERS, groups=(("x", "z"), ("y",)))
    told = script(retraining(folders, mixed), tmp_path).splitlines()
    assert "# Their rows are read in different ways: give them one form, then run" in told
    assert sum(line.startswith("# lora-train ") for line in told) == 1
    assert sum(line.startswith("lora-train ") for line in told) == 1


def test_records_that_tell_nothing_are_refused_together(folders, tmp_path):
    (folders["x"] / "training.json").unlink()
    write_json(folders["y"] / "training.json", {"config": {"data": "y"}})
    mixed = as_json(Config(data=("z",), out=tmp_path, mix=Mixing(of=("a=b",))))
    write_json(folders["z"] / "training.json", {"config": mixed})
    with pytest.raises(InputError, match=r"x.* does not exist; .*y.*not tell.*; z is a learned"):
        retraining(folders, CLUSTERS)
    with pytest.raises(InputError, match="z has no folder"):
        retraining({"x": folders["y"]}, CLUSTERS)

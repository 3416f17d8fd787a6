"""What the training tests share: the tiny base in memory, a small data set, and runs on them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_jax import bases, tokens
from train import run as run_file
from train.config import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def base(base_folder):
    """The tiny model in memory."""
    return bases.load_base(str(base_folder))


@pytest.fixture(scope="session")
def tokenizer(base_folder):
    """The byte-level tokenizer: one token a byte."""
    return tokens.load_tokenizer(base_folder)


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes rows as JSONL and gives back the path."""

    def write(rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """Forty rows of one length bucket: digits in a prompt, their sum as the completion."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    pairs = [(i % 7, i % 5) for i in range(40)]
    rows = [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}"} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def config_of(base_folder, sums, tmp_path_factory):
    """A function from changes to the config of a short run on the sums, in a folder of its own."""

    def make(**changes) -> Config:
        settings = {
            "data": (sums,),
            "out": tmp_path_factory.mktemp("run") / "out",
            "base": str(base_folder),
            "length": 64,
            "rank": 4,
            "steps": 8,
            "learning_rate": 3e-2,
            "checkpoint_every": 4,
        }
        return Config(**settings | changes)

    return make


@pytest.fixture(scope="session", autouse=True)
def programs():
    """What the runs here compile, kept so that runs alike compile once: a function from a config.

    Alike are those that differ in their data alone, or in when they validate and save.
    """
    make, made = run_file.make_programs, {}

    def alike(config):
        elsewhere = {"data": (), "out": Path(), "start_from": None, "validation_data": ()}
        elsewhere |= {"validation": 0.0, "evaluate_every": 0, "checkpoint_every": 0}
        return replace(config, resume=False, overwrite=False, **elsewhere)

    def kept(config, *rest):
        key = alike(config), *rest
        if key not in made:
            made[key] = make(config, *rest)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_file, "make_programs", kept)
        yield lambda config: next(m for (key, *_), m in made.items() if key == alike(config))


@pytest.fixture(scope="session")
def finished(config_of, base):
    """The config of a finished run."""
    config = config_of(steps=60, checkpoint_every=10, evaluate_every=15)
    assert run_file.train(config, base) == config.out
    return config


@pytest.fixture(scope="session")
def lora_train(tmp_path_factory):
    """A function that starts `lora-train` as a process of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def start(*arguments: object) -> subprocess.Popen:
        code = "from train.cli import main; main()"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LORA_JAX_CACHE": str(cache)}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    return start

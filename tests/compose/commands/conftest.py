"""Adapters on disk that name the tiny base model, and the records of the runs that made them."""

import sys

import pytest

from compose import cli
from compose.folder import save_library
from compose.library import Library
from lora_jax import peft
from lora_jax.files import write_json


@pytest.fixture(scope="session")
def folders(tmp_path_factory, config, random_lora, base_folder):
    """x and near, nearly the same; y, of another seed; all trained. lib: x and y, no records."""
    root = tmp_path_factory.mktemp("modules")
    made = {name: random_lora(config, n, targets=("q_proj",)) for n, name in enumerate(("x", "y"))}
    made["near"] = {p: m.replace(b=1.1 * m.b, a=m.a + 1e-3) for p, m in made["x"].items()}
    for name, adapter in made.items():
        peft.save_adapter(root / name, adapter, config, base_name=str(base_folder))
        run = {"data": [f"{name}.jsonl"], "init_seed": int(name == "y"), "prompt": "{q}"}
        write_json(root / name / "training.json", {"config": run})
    library = Library(("x", "y"), (made["x"], made["y"]))
    save_library(root / "lib", library, config, base_name=str(base_folder))
    return root


@pytest.fixture
def command(monkeypatch):
    """A function that runs lora-compose with these words."""
    monkeypatch.setattr("lora_jax.runtime.prepare", lambda: None)
    for name in ("explain", "similar", "cluster", "diagnose"):
        monkeypatch.setattr(f"compose.commands.{name}.prepare", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lora-compose", *map(str, words)])
        cli.main()

    return call


@pytest.fixture
def refused(command, capsys):
    """A function that runs lora-compose on what it must refuse, to what it says."""

    def call(*words):
        with pytest.raises(SystemExit) as left:
            command(*words)
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    return call

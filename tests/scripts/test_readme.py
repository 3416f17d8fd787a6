"""What README prints is run as it stands: its Python, and the flags of its commands."""

import re
import shlex
from pathlib import Path

import pytest

from scripts.demo.tasks import write_files
from train.cli import parse

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_training_commands_parse_and_their_files_are_the_demos(tmp_path):
    lines = [line for line in README.splitlines() if line.startswith("lora-train ")]
    runs = [parse(shlex.split(line)[1:]) for line in lines]
    assert "python -m scripts.demo --only-data && cd out/demo/data" in README
    written = write_files(tmp_path, train=2, test=2)
    assert len(runs) == 3 and all((written / run.data[0]).is_file() for run in runs)
    assert len({(run.init_seed, run.rank, run.targets) for run in runs}) == 1


@pytest.mark.slow
def test_the_python_example_runs_as_printed(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    changes = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert len(changes) == 3 and all(float(change) > 0 for change in changes)

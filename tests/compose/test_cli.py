import subprocess
import sys
import time
from pathlib import Path

import pytest

from compose import cli

ROOT = Path(__file__).resolve().parents[2]


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["lora-compose", *arguments])
    cli.main()


def test_arguments_become_a_command(monkeypatch):
    seen = []
    monkeypatch.setattr("compose.command.run", seen.append)
    call(monkeypatch, "a - b", "a=x", "b=y", "--out", "o", "--space", "factor", "--rank", "4")
    want = cli.Command("a - b", ("a=x", "b=y"), Path("o"), space="factor", rank=4)
    assert seen == [want]


@pytest.mark.parametrize("expression", ["-a + b", "-0.5*a", "-a"])
def test_an_expression_may_start_with_a_minus(monkeypatch, expression):
    seen = []
    monkeypatch.setattr("compose.command.run", seen.append)
    call(monkeypatch, expression, "a=x", "--out", "o")
    assert seen[0].expression.strip() == expression


def test_bad_input_is_one_message_and_status_two(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "a - toxik", "a=x", "--out", str(tmp_path / "o"))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: column 5: unknown name 'toxik'") and "Traceback" not in said


def test_a_full_disk_is_told_and_not_traced(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compose.command.run", full)
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "a", "a=x", "--out", "o")
    assert left.value.code == 2 and "No space left on device" in capsys.readouterr().err


def test_help_needs_no_jax():
    code = (
        "import sys; sys.argv = ['lora-compose', '--help']\n"
        "from compose.cli import main\n"
        "try: main()\n"
        "finally: assert 'jax' not in sys.modules and 'lark' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NAME=FOLDER" in done.stdout and time.perf_counter() - start < 5


def test_flags_are_told_once(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    told = capsys.readouterr().out
    assert "--overwrite" in told and "--no-overwrite" not in told

"""First words that name a command; all else is an expression, as before."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from compose import cli
from compose.commands.arguments import ARGUMENTS, Cluster, Diagnose, Explain, Similar

ROOT = Path(__file__).resolve().parents[3]
CALLS = {
    "explain": (["a=x", "b=y", "--json", "f"], Explain(("a=x", "b=y"), json=Path("f"))),
    "similar": (["a=x", "--to", "a"], Similar(("a=x",), to="a")),
    "cluster": (["lib", "--k", "3", "--out", "o"], Cluster(("lib",), 3, Path("o"))),
    "diagnose": (["-a", "a=x", "--space", "factor"], Diagnose(" -a", ("a=x",), space="factor")),
}


@pytest.mark.parametrize("word", ARGUMENTS)
def test_a_first_word_is_a_command(monkeypatch, word):
    seen = []
    words, want = CALLS[word]
    monkeypatch.setattr(f"compose.commands.{word}.run", seen.append)
    monkeypatch.setattr("compose.command.run", lambda _: pytest.fail("composed"))
    monkeypatch.setattr(sys, "argv", ["lora-compose", word, *words])
    cli.main()
    assert seen == [want]


def test_the_words_within_an_expression_are_names(monkeypatch):
    seen = []
    monkeypatch.setattr("compose.command.run", seen.append)
    monkeypatch.setattr(sys, "argv", ["lora-compose", "similar + b", "similar=x", "b=y"])
    cli.main()
    assert seen == [cli.Command("similar + b", ("similar=x", "b=y"))]


def test_help_texts_need_no_jax():
    code = (
        "import sys\nfrom compose.cli import main\n"
        f"for word in {list(ARGUMENTS)}:\n"
        "    sys.argv = ['lora-compose', word, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as left: assert left.code == 0\n"
        "assert 'jax' not in sys.modules and 'lark' not in sys.modules"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"lora-compose {word}" in done.stdout for word in ARGUMENTS)
    assert "--no-overwrite" not in done.stdout and time.perf_counter() - start < 10

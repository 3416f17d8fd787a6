"""The command from end to end, and what it says when it cannot."""

import json
import subprocess
import sys
import time

import pytest

from eval import cli
from lora_jax import peft, runtime


@pytest.fixture(scope="module")
def root(tmp_path_factory, config, random_lora, random_ia3):
    """A data root, two adapters and a task file."""
    root = tmp_path_factory.mktemp("root")
    rows = [
        {
            "question": f"What is {n}?",
            "choices": ["one", "two", "many"][: 2 + n % 2],
            "label": n % 2,
        }
        for n in range(8)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "arc_easy").mkdir()
    (root / "arc_easy" / "test.jsonl").write_text(text)
    (root / "mine.json").write_text(
        json.dumps({"rows": "mine.jsonl", "prompt": "{question}", "choices": ["ja", "nein"]})
    )
    (root / "mine.jsonl").write_text(text)
    (root / "some.txt").write_text("A text that is long enough to be read. " * 5)
    peft.save_adapter(root / "a", random_lora(config), config)
    peft.save_adapter(root / "b", random_ia3(config), config)
    return root


@pytest.fixture
def command(monkeypatch, base_folder, root):
    """A function that runs the command in the data root; the compilation cache is left alone."""
    monkeypatch.setattr(runtime, "prepare", lambda: None)

    def run(*arguments: str) -> None:
        shared = ("--base", str(base_folder), "--data-root", str(root))
        monkeypatch.setattr(sys, "argv", ["lora-eval", *arguments, *shared])
        cli.main()

    return run


def test_measures_and_writes(command, root, tmp_path, capsys):
    command(
        *f"arc_easy --task-file {root}/mine.json --text {root}/some.txt".split(),
        *f"--adapters a={root}/a b={root}/b --compare a base half=0.5*a".split(),
        *f"--window 64 --stride 32 --out {tmp_path}/out".split(),
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [line["column"] for line in found["numbers"]] == ["a", "base", "half"] * 3
    assert [task["task"] for task in found["tasks"]] == ["arc_easy", "mine", "some"]
    assert len(found["tasks"][0]["examples"][0]["scores"]["base"]) == 2
    assert len(found["tasks"][0]["sha256"]) == 64
    assert found["provenance"]["columns"]["half"] == "0.5*a"
    assert len(found["provenance"]["adapters"]["a"]["sha256"]) == 64
    assert (tmp_path / "out" / "accuracy.png").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "results.json")


def test_replies_without_a_task(command, tmp_path, capsys):
    command(*f"--generate Hello --format chat --max-new-tokens 4 --out {tmp_path}/out".split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["replies"]["prompts"] == ["Hello"] and found["numbers"] == []
    assert "Hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["arc_eazy"], "unknown task 'arc_eazy'; choose from"),
        ([], "nothing to measure"),
        (["arc_easy", "--adapters", "base=x"], "'base=x': the name 'base' is taken"),
        (["arc_easy", "arc_easy"], "given twice"),
        (["arc_easy", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["arc_easy", "--top-p", "2"], "top_p must lie in (0, 1]; got 2.0"),
        (
            ["arc_easy", "--generate", "Hi", "--max-new-tokens", "127"],
            "'Hi' has 2 tokens and --max",
        ),
        (["piqa"], "piqa/validation.jsonl does not exist"),
        (["arc_easy", "--adapters", "a=/nowhere"], "/nowhere"),
        (["arc_easy", "--compare", "zzz"], "zzz"),
        (["arc_easy", "--out", "full"], "exists; choose another --out or pass --overwrite"),
    ],
)
def test_what_cannot_be_is_one_line(command, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("")
    with pytest.raises(SystemExit) as left:
        command(*arguments)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2
    assert len(told) == 1 and message in told[0]


def test_help_answers_at_once():
    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        return time.perf_counter() - start

    run = "import sys; sys.argv = ['lora-eval', '--help']; from eval.cli import main; main()"
    best, bare = (min(seconds(code) for _ in range(3)) for code in (run, "pass"))
    assert best - bare < 0.5


def test_the_command_imports_nothing_heavy():
    code = "import sys, eval.cli; print([m for m in ('jax', 'numpy', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

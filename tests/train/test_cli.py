"""The command line: a quick help, presets as defaults, and errors of one line with status 2."""

import resource
import subprocess
import sys

import pytest

from lora_jax import runtime
from lora_jax.errors import InputError
from train import cli
from train.cli import main, parse
from train.presets import PRESETS

HELP = "from train.cli import main; main()"


def seconds(root, code, *arguments):
    """The processor time of the fastest of three runs, which counts nobody else's work."""

    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(3):
        before = used()
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=root)
        times.append(used() - before)
    return min(times)


def test_help_answers_half_a_second_after_python(pytestconfig):
    root = pytestconfig.rootpath
    assert seconds(root, HELP, "--help") - seconds(root, "pass") < 0.5


def test_help_tells_flags_and_presets(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    told = capsys.readouterr().out
    assert left.value.code == 0
    words = (*PRESETS, "--learning-rate", "--mesh-fsdp", "LoRA's rank", "FILE ...")
    assert all(word in told for word in words)


def test_parsing_needs_nothing_heavy(pytestconfig):
    code = "import sys, train.cli; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    heavy = {"jax", "numpy", "flax", "optax", "orbax", "transformers", "datasets", "matplotlib"}
    assert "tyro" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_flags_fill_the_config():
    flags = ["a.jsonl", "b.jsonl", "--validation-data", "c.jsonl", "d.jsonl", "--out", "o"]
    config = parse([*flags, "--targets", "q_proj", "v_proj", "--rank", "2", "--pack"])
    assert config.data == ("a.jsonl", "b.jsonl")
    assert config.validation_data == ("c.jsonl", "d.jsonl")
    assert config.targets == ("q_proj", "v_proj")
    assert (config.rank, config.pack, str(config.out)) == (2, True, "o")


@pytest.mark.parametrize("flags", [["--preset", "pem-ia3"], ["--preset=pem-ia3"]])
def test_a_preset_gives_defaults_that_flags_override(flags):
    config = parse(["a.jsonl", "--out", "o", "--steps", "5", *flags])
    wanted = PRESETS["pem-ia3"] | {"steps": 5, "preset": "pem-ia3"}
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_an_unknown_preset_is_refused():
    with pytest.raises(InputError, match="unknown preset 'pem'"):
        parse(["a.jsonl", "--out", "o", "--preset", "pem"])


@pytest.fixture
def fail(monkeypatch, capsys):
    """A function from arguments to the status and the lines of a command that fails."""
    monkeypatch.setattr(runtime, "prepare", lambda: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--preset", "pem"], "unknown preset 'pem'"),
        (["--rank", "0"], "--rank must be positive; got 0"),
        (["--targets", "query"], "unknown projection 'query'; this model has self_attn.q_proj"),
        (["--base", "/nowhere/model"], "no model at '/nowhere/model'"),
        (["--resume"], "nothing to resume"),
        (["--mesh-data", "1000"], "does not fit"),
        (["--start-from", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(fail, sums, base_folder, tmp_path, flags, told):
    common = [sums, "--base", base_folder, "--out", tmp_path / "out", "--length", "64"]
    status, lines = fail(*common, *flags)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and told in lines[0]


@pytest.mark.parametrize(
    ("data", "told"),
    [([], "give at least one data file"), (["absent.jsonl"], "absent.jsonl is not a file")],
)
def test_missing_data_are_told_in_one_line(fail, base_folder, tmp_path, data, told):
    flags = ["--base", base_folder, "--out", tmp_path / "out", "--length", "64"]
    status, lines = fail(*data, *flags)
    assert status == 2 and len(lines) == 1 and told in lines[0]


def test_an_interrupt_before_training_is_no_traceback(fail, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupted)
    status, lines = fail()
    assert status == 130 and lines[0].startswith("stopped") and len(lines) == 1

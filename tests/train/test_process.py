"""Runs in processes of their own: killed, interrupted, failing, and on eight devices."""

import json
import random
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from train.record import read_metrics
from train.run import train


def result(folder):
    """A run's module to the bit, and its metrics but for its speed."""
    rows = read_metrics(folder / "metrics.jsonl")
    timeless = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return (folder / "adapter_model.safetensors").read_bytes(), timeless


def started(process, folder, lines):
    """Waits until a process has written down so many numbers, with a checkpoint among them."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        checkpoints = folder / "checkpoints"
        saved = checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())
        if saved and len(read_metrics(folder / "metrics.jsonl")) >= lines:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run was over too soon: {process.communicate()}")


@pytest.fixture
def launched(lora_train, finished, tmp_path):
    """A function that starts the finished run's like in a process of its own."""

    def launch(*flags):
        config = replace(finished, out=tmp_path / "out")
        names = ("base", "out", "length", "rank", "steps", "learning_rate")
        names += ("checkpoint_every", "evaluate_every")
        given = [x for n in names for x in (f"--{n.replace('_', '-')}", getattr(config, n))]
        return config, lora_train(*config.data, *given, *flags)

    return launch


@pytest.fixture
def lines(request):
    """How many numbers a run writes down before it is stopped: drawn by the test's name."""
    return random.Random(request.node.name).randint(12, 45)


def test_a_killed_run_resumes_to_the_same_bits(launched, finished, base, lines):
    config, process = launched()
    started(process, config.out, lines)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (config.out / "adapter_model.safetensors").exists()
    train(replace(config, resume=True), base)
    assert result(config.out) == result(finished.out)


def test_an_interrupted_run_keeps_its_last_step(launched, finished, base, lines):
    config, process = launched()
    started(process, config.out, lines)
    process.send_signal(signal.SIGTERM)  # a background job ignores SIGINT
    _, told = process.communicate()
    assert process.returncode == 130 and "Traceback" not in told
    step = int(re.search(r"stopped after step (\d+); --resume goes on", told)[1])
    assert step == max(int(p.name) for p in (config.out / "checkpoints").iterdir())
    train(replace(config, resume=True), base)
    assert result(config.out) == result(finished.out)


def test_a_loss_that_is_not_finite_ends_the_command_in_one_line(launched):
    config, process = launched("--learning-rate", "1e30", "--clip", "0")
    _, told = process.communicate()
    assert process.returncode == 2 and "Traceback" not in told
    error = told.strip().splitlines()[-1]
    step = int(re.match(r"error: step (\d+) gave loss (nan|inf)", error)[1])
    assert f"its batch begins with {config.data[0]} line" in error
    assert (config.out / "checkpoints" / str(step - 1)).is_dir()


MESHES = """
from pathlib import Path
from train.config import Config
from train.record import read_metrics
from train import run

made, make = [], run.make_programs
run.make_programs = lambda *a: made.append(make(*a)) or made[-1]
settings = dict(data=({data!r},), base={base!r}, length=64, rank=4, steps=6, learning_rate=3e-2,
                checkpoint_every=0, validation=0.0)
for name, mesh in dict(one=(1, 1, 1), data=(8, 1, 1), mixed=(2, 2, 2)).items():
    sizes = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), mesh))
    out = run.train(Config(out=Path({out!r}) / name, **settings, **sizes))
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    print([losses, made[-1].train._cache_size()])
"""


def test_eight_devices_train_as_one_does(run_on_devices, sums, base_folder, tmp_path):
    code = MESHES.format(data=sums, base=str(base_folder), out=str(tmp_path))
    told = [json.loads(line) for line in run_on_devices(code).splitlines()]
    (one, *others), compiled = zip(*told, strict=True)
    assert compiled == (1, 1, 1)
    assert len(one) == 6 and one[-1] < one[0]
    for course in others:  # the order of sums differs, so the curves part in the last digits
        np.testing.assert_allclose(course, one, rtol=1e-3)

"""PEM's experiment on distributions, in small: modules of two halves of a task, and their average.

Zhang et al., "Composing Parameter-Efficient Modules with Arithmetic Operations", section 4.2: each
half has more of one label; both modules begin alike, and are averaged together with their heads.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from compose.cli import Command
from compose.command import run as compose
from eval.config import Evaluation
from eval.run import run
from lora_jax import bases, models, peft
from train.config import Config
from train.run import train


def texts(count, seed):
    """Texts of a's and b's; the label says of which there are more."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        label, size = int(random.integers(2)), int(random.integers(7, 12))
        least = int(random.integers(1, 3))
        letters = ["ab"[label]] * (size - least) + ["ab"[1 - label]] * least
        yield {"text": "".join(random.permutation(letters)), "label": label}


def halves():
    """Two halves of the task: 65 % of the one label go to the first, the rest to the second."""
    rows = list(texts(300, seed=0))
    none, one = ([row for row in rows if row["label"] == label] for label in (0, 1))
    cut = int(0.65 * len(none))
    mixed = 150 - cut
    return {"first": none[:cut] + one[:mixed], "second": none[cut:] + one[mixed:]}


@pytest.fixture(scope="module")
def trained(classifier_folder, tmp_path_factory) -> Path:
    """A folder with the modules of both halves, their averages in both spaces, and the task."""
    folder = tmp_path_factory.mktemp("halves")

    def write(name, rows):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    for name, rows in halves().items():
        train(
            Config(
                data=(write(name, rows),),
                out=folder / name,
                base=str(classifier_folder),
                length=16,
                rank=4,
                batch=16,
                steps=100,
                learning_rate=6e-3,
                validation=0.0,
                checkpoint_every=0,
            )
        )
    inputs = tuple(f"{name}={folder / name}" for name in ("first", "second"))
    for space in ("delta", "factor"):
        compose(Command("mean(first, second)", inputs, out=folder / space, space=space))
    write("test", texts(400, seed=1))
    (folder / "task.json").write_text(json.dumps({"kind": "classification", "rows": "test.jsonl"}))
    return folder


def test_the_averages_of_two_halves_modules_do_what_both_do(trained, classifier_folder, tmp_path):
    names = ("first", "second", "delta", "factor")
    run(
        Evaluation(
            base=str(classifier_folder),
            task_file=(trained / "task.json",),
            adapters=tuple(f"{name}={trained / name}" for name in names),
            compare=(*names, "half=0.5*first + 0.5*second"),
            out=tmp_path / "results",
        )
    )
    document = json.loads((tmp_path / "results" / "results.json").read_text())
    accuracy = {line["column"]: line["value"]["value"] for line in document["numbers"]}
    assert all(accuracy[name] > 0.95 for name in names)
    for example in document["tasks"][0]["examples"]:
        scores = example["scores"]
        np.testing.assert_allclose(scores["half"], scores["delta"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_their_heads_are_averaged_alike_in_both_spaces(trained, classifier_folder, space):
    config = bases.load_config(str(classifier_folder))
    load = lambda name: peft.load_adapter(trained / name, config)  # noqa: E731
    first, second, both = map(load, ("first", "second", space))
    for path in models.head_paths(config):
        mean = (first[path].value + second[path].value) / 2
        np.testing.assert_allclose(both[path].value, mean, rtol=1e-5, atol=1e-7)
        assert np.abs(first[path].value - second[path].value).max() > 1e-3

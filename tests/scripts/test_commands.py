"""The three commands where `test_families` does not reach: T5, RoBERTa, and bases in few bits."""

import json

import numpy as np
import pytest

from compose import cli as compose
from eval import cli as evaluate
from lora_jax import bases, models, peft
from train import cli as train

pytestmark = pytest.mark.slow
SHORT = (
    "--steps 3 --batch 2 --length 24 --rank 2 --learning-rate 3e-2 "
    "--validation 0 --checkpoint-every 0"
)
SUMS = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}"} for n in range(6)]
CHOICES = [{"prompt": f"{n} and 1 is", "choices": [" 3", " 40"], "label": 0} for n in range(3)]
TEXTS = [{"text": letter * n, "label": letter == "b"} for n in range(3, 6) for letter in "ab"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def given(line, base):
    """A command's arguments: the words of a line, and the base model."""
    return [*line.split(), "--base", base]


def scores(folder):
    """Every column's scores in a results.json, and all that it holds."""
    found = json.loads((folder / "results.json").read_text())
    examples = [example["scores"] for task in found["tasks"] for example in task["examples"]]
    return {name: np.array([scores[name] for scores in examples]) for name in examples[0]}, found


@pytest.mark.parametrize("bits", ["none", "int8", "nf4"])
def test_an_encoder_decoder_is_trained_composed_and_measured(
    call, rows_file, tmp_path, t5_folder, bits
):
    rows_file(tmp_path / "sums.jsonl", SUMS)
    task = {"rows": str(rows_file(tmp_path / "rows.jsonl", CHOICES)), "choices": "choices"}
    (tmp_path / "task.json").write_text(json.dumps(task | {"prompt": "{prompt}"}))
    call(train, *given(f"sums.jsonl --out a {SHORT} --quantize {bits}", t5_folder))
    config = bases.load_config(str(t5_folder))
    ends = {path.rpartition(".")[2] for path in peft.load_adapter(tmp_path / "a", config)}
    assert ends == set(models.default_targets(config))
    assert json.loads((tmp_path / "a" / "training.json").read_text())["finished"]
    call(compose, *given("2*a a=a --out twice", t5_folder))
    line = "--task-file task.json --adapters a=a twice=twice --out out --generate Hi"
    call(evaluate, *given(f"{line} --max-new-tokens 2 --quantize {bits}", t5_folder))
    found, results = scores(tmp_path / "out")
    assert results["provenance"]["settings"]["quantize"] == bits
    assert list(found) == ["base", "a", "twice"]
    assert all(np.isfinite(x).all() for x in found.values())
    for one, other in (("a", "base"), ("twice", "base"), ("twice", "a")):
        assert np.abs(found[one] - found[other]).max() > 1e-3


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_a_classifier_is_trained_averaged_and_measured(
    call, rows_file, tmp_path, classifier_folder, bits
):
    rows_file(tmp_path / "texts.jsonl", TEXTS)
    task = {"kind": "classification", "rows": str(tmp_path / "texts.jsonl")}
    (tmp_path / "task.json").write_text(json.dumps(task))
    for name, seed in (("a", 0), ("b", 1)):
        line = f"texts.jsonl --out {name} {SHORT} --seed {seed} --quantize {bits}"
        call(train, *given(line, classifier_folder))
    call(compose, *given("mean(a,b) a=a b=b --out both", classifier_folder))
    config = bases.load_config(str(classifier_folder))
    one, other, both = (peft.load_adapter(tmp_path / name, config) for name in ("a", "b", "both"))
    heads = [path for path in both if path.startswith("classifier")]
    assert len(heads) == 4
    for path in heads:
        mean = (one[path].value + other[path].value) / 2
        np.testing.assert_allclose(both[path].value, mean, atol=1e-6)
    line = "--task-file task.json --adapters a=a both=both --out out"
    call(evaluate, *given(f"{line} --quantize {bits}", classifier_folder))
    found, _ = scores(tmp_path / "out")
    assert all(np.isfinite(x).all() for x in found.values())
    assert np.abs(found["a"] - found["both"]).max() > 1e-4


def test_a_base_in_few_bits_is_what_trains_and_what_is_measured(
    call, rows_file, tmp_path, base_folder
):
    """The numbers of each are its own, and near those of the base itself."""
    rows_file(tmp_path / "sums.jsonl", SUMS)
    task = {"rows": str(rows_file(tmp_path / "rows.jsonl", CHOICES)), "choices": "choices"}
    (tmp_path / "task.json").write_text(json.dumps(task | {"prompt": "{prompt}"}))
    losses, found = {}, {}
    for bits in ("none", "int8", "nf4"):
        call(train, *given(f"sums.jsonl --out {bits} {SHORT} --quantize {bits}", base_folder))
        metrics = (tmp_path / bits / "metrics.jsonl").read_text().splitlines()
        losses[bits] = json.loads(metrics[0])["loss"]
        line = f"--task-file task.json --adapters a=none --out out-{bits} --quantize {bits}"
        call(evaluate, *given(line, base_folder))
        found[bits] = scores(tmp_path / f"out-{bits}")[0]
    for column in ("base", "a"):
        off = [np.abs(found[bits][column] - found["none"][column]).max() for bits in found]
        assert 0 < off[1] < off[2] < 0.5
    assert 0 < abs(losses["int8"] - losses["none"]) < abs(losses["nf4"] - losses["none"]) < 0.5


def test_a_kind_of_few_bits_that_there_is_not_is_refused(call, base_folder, capsys):
    with pytest.raises(SystemExit) as left:
        call(evaluate, *given("arc_easy --quantize int4", base_folder))
    assert left.value.code == 2
    assert "int4" in capsys.readouterr().err

"""A run end to end: what it leaves behind, what it starts from, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.files import read_json, write_json
from train import run as run_file
from train.batches import assemble, epoch_batches
from train.data import plan_data
from train.loss import batch_loss
from train.record import read_metrics
from train.run import first_adapter, train


def losses(folder, name="loss"):
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_loss_falls(finished):
    course = losses(finished.out)
    assert len(course) == 60 and np.mean(course[-10:]) < 0.5 * np.mean(course[:5])


def test_the_folder_is_whole(finished, base):
    config = finished
    names = {path.name for path in config.out.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "training.json",
    }
    record = json.loads((config.out / "training.json").read_text())
    assert record["finished"] and record["steps"] == 60 and record["examples"] == 36
    assert record["config"]["rank"] == 4 and record["base_sha256"] == base.digest


def test_the_adapter_is_the_one_of_the_lowest_validation_loss(finished, base):
    config = finished
    adapter = peft.load_adapter(config.out, base.config)
    _, held_out = plan_data(config, base, None)
    loss = jax.jit(lambda b: batch_loss(base.config, base.weights, adapter, b))
    batches = [assemble(held_out, rows) for rows in epoch_batches(held_out, 0, 0)]
    total = sum(float(loss(jax.tree.map(lambda x: x[0], b))) for b in batches)
    lowest = min(losses(config.out, "validation_loss"))
    np.testing.assert_allclose(total / sum(b.weights.sum() for b in batches), lowest, rtol=1e-4)


def test_each_length_is_compiled_once(finished, programs):
    made = programs(finished)
    assert max(made.train._cache_size(), made.validate._cache_size()) <= 1  # rows of one length


@pytest.mark.parametrize("layout", ["peft", "pem"])
def test_ia3_trains_in_both_layouts(config_of, base, layout):
    config = config_of(kind="ia3", ia3_layout=layout, steps=20, learning_rate=0.1, validation=0.0)
    train(config, base)
    course = losses(config.out)
    assert np.mean(course[-3:]) < np.mean(course[:3])
    adapter = peft.load_adapter(config.out, base.config)
    assert adapter.keys() == first_adapter(config, base).keys()
    assert all(np.any(module.offset) for module in adapter.values())


def test_dora_trains_its_magnitudes_too(config_of, base):
    config = config_of(kind="dora", steps=20, learning_rate=0.05, validation=0.0)
    train(config, base)
    course = losses(config.out)
    assert np.mean(course[-3:]) < np.mean(course[:3])
    trained, first = peft.load_adapter(config.out, base.config), first_adapter(config, base)
    for path, module in trained.items():
        assert not np.allclose(module.magnitude, first[path].magnitude, rtol=1e-3)


def test_an_ia3_layout_that_a_family_lacks_is_refused(config_of, base, monkeypatch):
    monkeypatch.delitem(models.family(base.config).IA3_LAYOUTS, "pem")
    with pytest.raises(InputError, match=r"--ia3-layout pem has no place .* choose peft"):
        first_adapter(config_of(kind="ia3", ia3_layout="pem"), base)


def test_modules_of_one_init_seed_begin_alike(config_of, base):
    one = first_adapter(config_of(init_seed=3, seed=1), base)
    two = first_adapter(config_of(init_seed=3, seed=2, targets=("q_proj",)), base)
    other = first_adapter(config_of(init_seed=4, seed=1), base)
    path = "self_attn.q_proj"
    np.testing.assert_array_equal(one[path].a, two[path].a)
    assert np.any(one[path].a != other[path].a)


STILL = {"steps": 1, "learning_rate": 0.0, "validation": 0.0, "checkpoint_every": 0}


def test_a_run_can_start_from_an_adapter_here_or_on_the_hub(config_of, base, finished, hub):
    hub(finished.out)
    for place in (str(finished.out), "hf://ann/tiny"):
        config = config_of(start_from=place, **STILL)
        assert weights_of(train(config, base)) == weights_of(finished.out)


def test_data_on_the_hub_is_hashed_like_other_data(config_of, base, finished, hub):
    rows = Path(finished.data[0])
    hub(rows.parent)
    there = f"hf://datasets/ann/rows/{rows.name}"
    out = train(config_of(data=(there,), **STILL), base)
    hashes = [read_json(o / "training.json")["data_sha256"] for o in (out, finished.out)]
    assert [list(h.values()) for h in hashes] == [list(hashes[0].values())] * 2
    assert list(hashes[0]) == [there]


def test_an_existing_folder_is_refused_and_survives_a_mistake(finished, base, write_rows):
    config = finished
    before = weights_of(config.out)
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        train(config, base)
    for mistake in ({"data": ("absent.jsonl",)}, {"targets": ("q",)}):
        with pytest.raises(InputError):
            train(replace(config, overwrite=True, **mistake), base)
    assert weights_of(config.out) == before


def test_overwriting_leaves_nothing_of_the_old_run(config_of, base):
    config = config_of(**STILL)
    config.out.mkdir()
    (config.out / "training.json").write_text("{}")
    (config.out / "old.txt").write_text("old")
    train(replace(config, overwrite=True), base)
    assert not (config.out / "old.txt").exists()
    assert len(losses(config.out)) == 1


def test_resuming_a_finished_run_says_so(finished, base, capsys):
    config = finished
    before = weights_of(config.out)
    assert train(replace(config, resume=True), base) == config.out
    assert capsys.readouterr().err == f"{config.out} is finished; nothing is left to resume\n"
    assert weights_of(config.out) == before


def test_resuming_without_a_run_is_refused(config_of, base):
    with pytest.raises(InputError, match="nothing to resume"):
        train(config_of(resume=True), base)


def test_resuming_with_other_settings_names_them(finished, base):
    with pytest.raises(InputError, match="--rank was 4, is 8; --weight-decay was"):
        train(replace(finished, resume=True, rank=8, weight_decay=0.5), base)


def test_a_changed_base_or_data_are_no_resumption(config_of, base, finished):
    config = replace(finished, out=config_of().out)
    config.out.mkdir()
    record = json.loads((finished.out / "training.json").read_text()) | {"finished": False}
    for key, name in (("base_sha256", "base model"), ("data_sha256", "data")):
        write_json(config.out / "training.json", record | {key: "other"})
        with pytest.raises(InputError, match=f"whose {name} has changed"):
            train(replace(config, resume=True), base)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ({"data": ("absent.jsonl",)}, "absent.jsonl is not a file"),
        ({"validation_data": ("absent.jsonl",)}, "absent.jsonl is not a file"),
        ({"targets": ("query",)}, "unknown projection 'query'"),
        ({"start_from": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_is_not_there_is_told_before_weights_are_read(config_of, monkeypatch, mistake, told):
    monkeypatch.setattr(run_file, "load_base", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(InputError, match=told):
        train(config_of(**mistake))


def test_a_run_says_what_it_loads_and_what_came_out(config_of, base, capsys):
    config = config_of(**STILL | {"validation": 0.1})
    train(config)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"loading {config.base}"
    loss = losses(config.out)[-1]
    assert last.startswith(f"1 steps, last training loss {loss:.4g}, lowest validation loss ")
    assert last.endswith(str(config.out))


def test_the_adapter_names_a_packaged_base_as_the_hub_does(config_of, base):
    out = train(config_of(base="smollm2-135m", **STILL), base)
    named = read_json(out / "adapter_config.json")["base_model_name_or_path"]
    assert named == "HuggingFaceTB/SmolLM2-135M-Instruct"

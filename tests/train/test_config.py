"""Numbers that make no sense are refused all at once, and a resumed run must be the same run."""

from dataclasses import fields, replace

import pytest

from lora_jax.errors import InputError
from train.config import Config, as_json, checked, refuse_other_run


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 0}, "--rank must be positive; got 0"),
        ({"length": 0}, "--length"),
        ({"batch": -1}, "--batch"),
        ({"accumulate": 0}, "--accumulate"),
        ({"alpha": float("nan")}, "--alpha"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate must be finite"),
        ({"epochs": float("inf")}, "--epochs must be finite"),
        ({"dropout": 1.0}, r"--dropout must lie in \[0, 1\)"),
        ({"optimizer_beta2": 1.0}, "--optimizer-beta2"),
        ({"validation": -0.1}, "--validation"),
        ({"seed": -1}, "--seed"),
        ({"init_seed": 2**32}, "--init-seed"),
        ({"checkpoint_every": -1}, "--checkpoint-every"),
        ({"data": ()}, "at least one data file"),
        ({"completion": "{q}"}, "--completion is the template of what follows --prompt"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_nonsense_is_refused_by_its_flag(config_of, changes, told):
    with pytest.raises(InputError, match=told):
        checked(config_of(**changes))


def test_all_problems_are_told_at_once(config_of):
    with pytest.raises(InputError, match=r"--rank .*--batch .*--dropout"):
        checked(config_of(rank=0, batch=0, dropout=2.0))


def test_good_settings_pass_unchanged(config_of):
    config = config_of()
    assert checked(config) == config


def test_every_setting_that_shapes_the_result_must_be_the_same(config_of):
    saved = as_json(config_of())
    refuse_other_run(config_of(), saved)
    free = {"resume": True, "overwrite": True, "checkpoint_every": 9, "out": config_of().base}
    refuse_other_run(replace(config_of(), **free, mesh_data=2, mesh_fsdp=2, mesh_tensor=2), saved)
    free |= {"learning_rate": 1e-9, "clip": 0.1, "accept": "gemma"}
    fixed = {f.name for f in fields(Config)} - {*free, "mesh_data", "mesh_fsdp", "mesh_tensor"}
    for name in fixed:
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} was "):
            refuse_other_run(config_of(), saved | {name: "other"})


def test_the_difference_is_told(config_of):
    with pytest.raises(InputError, match=r"another run: --rank was 4, is 8; --seed was 0, is 5"):
        refuse_other_run(config_of(rank=8, seed=5), as_json(config_of()))

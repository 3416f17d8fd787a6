"""Presets are settings of a run, and those of the papers."""

from dataclasses import fields

import pytest

from lora_jax.errors import InputError
from train.config import Config, checked
from train.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_config(config_of, name):
    known = {f.name: f for f in fields(Config)}
    assert PRESETS[name].keys() <= known.keys()
    for key, value in preset(name).items():
        assert type(value) is type(known[key].default), key
    checked(config_of(**preset(name)))


@pytest.mark.parametrize(
    ("name", "batch", "scale"),
    [("genknowsub-task", 16, 4), ("genknowsub-general", 256, 4), ("pem-lora", 32, 1)],
)
def test_rows_a_step_and_scale_are_the_papers(name, batch, scale):
    settings = preset(name)
    assert settings["batch"] * settings.get("accumulate", 1) == batch
    assert settings["alpha"] / settings["rank"] == scale


def test_general_modules_have_the_geometry_of_genknowsub():
    settings = preset("genknowsub-general")
    assert (settings["context"], settings["predict"], settings["steps"]) == (507, 5, 17)


@pytest.mark.parametrize(
    "pair", [("genknowsub-task", "genknowsub-general"), ("pem-lora", "pem-ia3")]
)
def test_modules_to_be_composed_share_their_initialisation(pair):
    assert len({preset(name)["init_seed"] for name in pair}) == 1


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(InputError, match="unknown preset 'pem'; choose from genknowsub-task"):
        preset("pem")

"""The papers' models as published: every name and shape that transformers gives their weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from lora_jax import models

PUBLISHED = json.loads((Path(__file__).parents[1] / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_weights_have_the_names_and_shapes_of_transformers(name, report):
    raw = PUBLISHED[name]["config"]
    kind = getattr(transformers, raw["architectures"][0])
    with torch.device("meta"):
        model = kind(kind.config_class(**raw))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    if name == "Flan-T5-base":  # its files hold a head, which transformers 5 ties
        theirs["lm_head.weight"] = theirs["shared.weight"]
    table = models.table(models.config_from_huggingface(raw))
    ours = {key: leaf.stored_shape() for leaf in table.values() for key in leaf.names()}
    assert ours == theirs
    report(f"{name}: {len(ours)} names and shapes are those of transformers")

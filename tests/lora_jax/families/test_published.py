"""The papers' models as published: their config.json alone, in shapes, without weights."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lora_jax import models, modules, table

PUBLISHED = json.loads((Path(__file__).parents[2] / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_its_size_and_runs_in_shape_under_a_module(outputs, name):
    config = models.config_from_huggingface(PUBLISHED[name]["config"])
    weights = table.abstract(models.table(config), jnp.bfloat16)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))
    assert count == PUBLISHED[name]["parameters"]
    targets = models.default_targets(config)
    init = partial(modules.init_lora, shapes=models.projections(config), targets=targets)
    adapter = jax.eval_shape(partial(init, rank=4, alpha=4.0), jax.random.key(0))
    assert adapter
    tokens = jax.ShapeDtypeStruct((2, 500), jnp.int32)
    logits = jax.eval_shape(partial(outputs, config), weights, adapter, tokens)
    wide = PUBLISHED[name]["config"]["vocab_size"]
    assert logits.shape == ((2, 2) if models.kind(config) == "classifier" else (2, 500, wide))

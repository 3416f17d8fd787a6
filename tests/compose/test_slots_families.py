"""The families' batches may have rows under different adapters, an encoder's too."""

import jax
import numpy as np
import pytest

from compose.slots import for_rows
from lora_jax import models
from lora_jax.families import gpt2, phi3, roberta, t5
from lora_jax.modules import LoRA
from lora_jax.rope import Rope

FAMILIES = {
    "phi3": phi3.Config(264, 32, 48, 2, 4, 2, 8, 128, Rope(4, 100.0), window=4),
    "gpt2": gpt2.Config(264, 32, 64, 2, 4, context=128),
    "roberta": roberta.Config(264, 32, 56, layers=2, heads=4, context=40, labels=("no", "yes")),
    "t5": t5.Config(264, 32, 48, encoder_layers=2, layers=3, heads=4, head_width=8),
}
ROWS = [2, 0, 1, 2]


def read(config, weights, adapter, tokens):
    """The hidden states of tokens, which an encoder-decoder reads too; a classifier's logits."""
    memory = None
    if models.kind(config) == "encoder-decoder":
        memory = models.encode(config, weights, adapter, tokens)
    hidden = models.forward(config, weights, adapter, tokens, memory=memory).hidden
    classifier = models.kind(config) == "classifier"
    return models.classify(config, weights, adapter, hidden) if classifier else hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_its_rows_one_by_one(
    family, random_weights, random_lora, random_ia3, random_tokens
):
    config = FAMILIES[family]
    weights, tokens = random_weights(config), random_tokens(4, 7)
    run = jax.jit(read, static_argnums=0)
    lora = random_lora(config, 1, targets=["all-linear"], rank=2)
    if family == "roberta":
        draw = np.random.default_rng(0).normal
        lora["classifier.dense"] = LoRA(draw(size=(32, 2)), draw(size=(2, 32)))
    lora["embed"] = LoRA(*(jax.random.normal(jax.random.key(0), s) for s in ((264, 2), (2, 32))))
    adapters = [{}, lora, random_ia3(config)]
    found = run(config, weights, for_rows(adapters, ROWS), tokens)
    for row, which in enumerate(ROWS):
        alone = run(config, weights, adapters[which], tokens[row : row + 1])[0]
        assert np.linalg.norm(found[row] - alone) < 1e-6 * np.linalg.norm(alone)

"""What is Gemma 3's alone, and the real 270M if fetched, against transformers and PEFT on torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig

from lora_jax import decoder, models, tokens
from lora_jax.modules import LoRA


@pytest.fixture
def rows(random_tokens):
    return np.asarray(random_tokens(2, 24)) % 96


def test_bfloat16_rounds_where_torch_does(pair, rows, logits, torch_logits, agree):
    """Embeddings are scaled by a rounded root, and norms multiply before they round."""
    model, config, weights = pair("Gemma3ForCausalLM", {"head_dim": 8})
    places = decoder.place(jnp.asarray(rows), None, None, None)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    scaled = models.family(config).begin(config, half, half["embed"][rows], places)[0]
    embed = model.to(torch.bfloat16).get_input_embeddings()
    with torch.no_grad():
        theirs = embed(torch.tensor(rows)).float().numpy()
    agree("gemma3, scaled embeddings in bfloat16", scaled.astype(jnp.float32), theirs, 0)


def test_a_lora_of_the_embedding_is_scaled_as_the_embedding_is(
    pair, with_modules, rows, hidden, torch_logits, agree
):
    model, config, weights = pair(
        "Gemma3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": False}
    )
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = with_modules(model, settings)
    theirs = model.base_model.model.model.embed_tokens
    a, b = (
        jnp.asarray(matrix["default"].detach().numpy().T)
        for matrix in (theirs.lora_embedding_A, theirs.lora_embedding_B)
    )
    states = hidden(config, weights, {"embed": LoRA(a, b, 1.5)}, rows)
    ours = models.unembed(config, weights, {}, states)
    agree("gemma3, LoRA of the embedding", ours, torch_logits(model, rows), 1e-4)


TEXTS = [
    "The bridge over the river was closed for repairs until the spring.",
    "Le pont sur la rivière est resté fermé pour travaux jusqu'au printemps.",
    "Die Brücke über den Fluss blieb wegen Bauarbeiten bis zum Frühjahr gesperrt.",
]


def test_the_real_model(gemma, logits, torch_logits, torch_model, agree):
    tokenizer = tokens.load_tokenizer(gemma.folder)
    ids = tokenizer(TEXTS)["input_ids"]
    width = max(map(len, ids))
    real = np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    rows = np.array([row + [0] * (width - len(row)) for row in ids])
    theirs = torch_logits(torch_model(gemma.folder), rows, attention_mask=torch.tensor(real))
    ours = logits(gemma.config, gemma.weights, {}, rows, segments=jnp.asarray(real))
    shown = real[..., None] == 1
    agree("Gemma-3-270M logits, en, fr, de", ours * shown, theirs * shown, 1e-3)


def test_the_real_model_past_its_window(gemma, logits, torch_logits, torch_model, agree):
    """A text longer than the 512 tokens that local layers reach back."""
    tokenizer = tokens.load_tokenizer(gemma.folder)
    row = np.array([tokenizer(" ".join(TEXTS * 14))["input_ids"][:640]])
    assert row.shape == (1, 640)
    ours = logits(gemma.config, gemma.weights, {}, row)[:, -32:]
    theirs = torch_logits(torch_model(gemma.folder), row)[:, -32:]
    agree("Gemma-3-270M logits, tokens 608 to 640", ours, theirs, 1e-3)

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, peft
from lora_jax.errors import InputError
from lora_jax.families import roberta
from lora_jax.modules import LoRA, Saved
from lora_jax.table import flatten

NORM = "base_model.model.model.norm.weight"


@pytest.fixture
def biased(config):
    """The tiny Llama with biases everywhere."""
    return replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)


def kept(weights, *paths):
    """Weights of the base as an adapter keeps them, changed a little."""
    flat = flatten(weights)
    found = {path: flat.get(path, flat.get(f"layers.{path}")) for path in paths}
    return {path: Saved(value + 0.5) for path, value in found.items()}


def test_whole_modules_come_back(folder, config, weights, random_lora, equal):
    adapter = random_lora(config, targets=["q_proj"])
    adapter |= kept(weights, "embed", "mlp.down_proj", "norm")
    made = folder(adapter)
    assert equal(made.load(), adapter)
    stems = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert made.settings["modules_to_save"] == ["model.embed_tokens", *stems, "model.norm"]
    assert made.settings["bias"] == "none"
    assert made.tensors[f"base_model.model.{stems[0]}.weight"].shape == (32, 64)


@pytest.mark.parametrize("spelling", [".modules_to_save.weight", ".modules_to_save.default.weight"])
def test_other_spellings_of_what_is_kept_are_read(
    folder, config, weights, random_lora, equal, spelling
):
    adapter = random_lora(config, targets=["q_proj"]) | kept(weights, "norm")
    made = folder(adapter)
    tensors = made.tensors
    value = tensors.pop(NORM)
    frozen = NORM.replace(".weight", ".original_module.weight")
    made.store(tensors | {NORM.replace(".weight", spelling): value, frozen: 0 * value})
    assert equal(made.load(), adapter)


@pytest.mark.parametrize("name", ["q_proj.bias", "q_proj.base_layer.bias"])
def test_the_biases_of_loras_own_modules(folder, random_weights, biased, random_lora, equal, name):
    weights = random_weights(biased)
    adapter = random_lora(biased, targets=["q_proj"]) | kept(weights, "self_attn.q_proj.bias")
    made = folder(adapter, biased)
    assert made.settings["bias"] == "lora_only" and made.settings["modules_to_save"] is None
    assert "base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias" in made.tensors
    tensors = {n.replace("q_proj.base_layer.bias", name): t for n, t in made.tensors.items()}
    made.store(tensors)
    assert equal(made.load(), adapter)


def test_every_bias(folder, random_weights, biased, random_lora, equal):
    weights = random_weights(biased)
    paths = [path for path in flatten(weights["layers"]) if path.endswith(".bias")]
    adapter = random_lora(biased, targets=["q_proj"]) | kept(weights, *paths)
    made = folder(adapter, biased)
    assert made.settings["bias"] == "all" and equal(made.load(), adapter)
    made.store({n: t for n, t in made.tensors.items() if "k_proj" not in n})
    assert "k_proj.bias has no tensor, though modules_to_save or bias asks for" in made.refusal()
    some = {path: m for path, m in adapter.items() if path != "self_attn.k_proj.bias"}
    with pytest.raises(InputError, match="12 biases are kept: keep all 14, or those of LoRA's own"):
        folder(some, biased)


def test_a_tied_embedding_kept_for_both_is_kept_for_both(folder, config, weights, random_lora):
    made = folder(random_lora(config, targets=["q_proj"]) | kept(weights, "embed"))
    assert "unembed" not in made.load()
    made.edit(ensure_weight_tying=True)
    loaded = made.load()
    assert (loaded["unembed"].value == loaded["embed"].value.T).all()


def test_the_embedding_kept_is_for_the_input_alone(config, weights, random_tokens):
    """As in PEFT: a tied head keeps the base's weight."""
    tokens, adapter = random_tokens(1, 4), kept(weights, "embed")
    hidden = models.forward(config, weights, adapter, tokens).hidden
    assert not np.allclose(hidden, models.forward(config, weights, {}, tokens).hidden, atol=0.01)
    logits = models.unembed(config, weights, adapter, hidden)
    np.testing.assert_allclose(logits, hidden @ weights["embed"].T, atol=1e-5)


def test_what_peft_cannot_keep_is_refused(
    tmp_path, config, weights, random_weights, biased, random_lora, random_ia3
):
    lora = random_lora(config, targets=["q_proj"])
    shared = {"norm": Saved(weights["norm"], jnp.full((), 0.5))}
    with pytest.raises(InputError, match=r"model\.norm\.weight was kept whole by some .*--merged"):
        peft.save_adapter(tmp_path / "a", lora | shared, config)
    kernel = kept(random_weights(biased), "mlp.down_proj")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj\.weight is kept without its"):
        peft.save_adapter(tmp_path / "a", lora | kernel, biased)
    bias = kept(random_weights(biased), "self_attn.k_proj.bias")
    with pytest.raises(InputError, match="PEFT keeps no biases of the base with IA3"):
        peft.save_adapter(tmp_path / "a", random_ia3(config) | bias, biased)


def test_a_classifiers_head_makes_it_peft_s_classifier(folder, random_weights):
    config = roberta.Config(
        vocabulary=40, width=8, hidden=16, layers=1, heads=2, context=8, labels=("no", "yes")
    )
    weights, key = random_weights(config), jax.random.key(0)
    factors = jax.random.normal(key, (1, 8, 1)), jax.random.normal(key, (1, 1, 8))
    adapter = {"attention.self.query": LoRA(*factors)}
    assert folder(adapter, config).settings["task_type"] is None
    whole = folder(adapter | kept(weights, *models.head_paths(config)), config)
    assert whole.settings["task_type"] == "SEQ_CLS"
    assert whole.settings["modules_to_save"] == ["classifier"]
    assert set(whole.load()) == {*adapter, *models.head_paths(config)}

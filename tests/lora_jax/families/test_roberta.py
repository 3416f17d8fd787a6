from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import checkpoint, merge, models
from lora_jax.errors import InputError
from lora_jax.families import roberta
from lora_jax.modules import LoRA, Saved
from lora_jax.table import new_weight

BASE = {  # roberta-base, as its config.json has it
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def config() -> roberta.Config:
    """A RoBERTa of two layers for three labels."""
    return roberta.Config(
        vocabulary=264,
        width=32,
        hidden=56,
        layers=2,
        heads=4,
        context=24,
        labels=("no", "maybe", "yes"),
        token_types=2,
    )


@pytest.fixture(scope="session")
def weights(config, random_weights):
    return random_weights(config)


@pytest.fixture
def folder(tmp_path, config, weights):
    """The model on disk, and a function that changes what its file stores."""
    checkpoint.save_model(tmp_path / "model", config, weights)
    path = tmp_path / "model" / "model.safetensors"

    def change(function):
        save_file(function(load_file(path)), path)
        return checkpoint.load_weights(path.parent, config)

    return change


@partial(jax.jit, static_argnums=0)
def labels(config, weights, adapter, tokens, segments=None):
    states = models.forward(config, weights, adapter, tokens, segments=segments).hidden
    return models.classify(config, weights, adapter, states, segments)


def test_roberta_base_has_its_size():
    config = models.config_from_huggingface(BASE)
    assert sum(np.prod(leaf.shape) for leaf in models.table(config).values()) == 124_647_170
    assert config.context == 512 and config.eps == 1e-5
    stored = {name for leaf in models.table(config).values() for name in leaf.names()}
    assert "roberta.encoder.layer.11.attention.self.query.weight" in stored
    assert "roberta.embeddings.LayerNorm.bias" in stored


def test_a_state_depends_on_its_whole_text_and_no_other(config, weights):
    def state(embed):
        tokens, segments = jnp.arange(9)[None], jnp.array([[1] * 4 + [2] * 3 + [0] * 2])
        weights_with = {**weights, "embed": embed}
        return (
            models.forward(config, weights_with, {}, tokens, segments=segments).hidden[0, 1].sum()
        )

    strength = np.abs(jax.jit(jax.grad(state))(weights["embed"])).sum(-1)[:9]
    assert (strength[:4] > 0).all()
    assert not strength[4:].any()


@pytest.mark.parametrize("left", [0, 3])
def test_padding_on_either_side_changes_no_label(config, weights, random_lora, random_tokens, left):
    adapter = random_lora(config, targets=["query", "value"])
    tokens, around = random_tokens(2, 6), ((0, 0), (left, 5 - left))
    padded = labels(
        config,
        weights,
        adapter,
        jnp.pad(tokens, around, constant_values=config.padding),
        jnp.pad(jnp.ones_like(tokens), around),
    )
    np.testing.assert_allclose(padded, labels(config, weights, adapter, tokens), atol=1e-5)


def test_packed_texts_are_as_if_alone(config, weights, hidden, random_lora, random_tokens):
    adapter = random_lora(config, targets=["all-linear"])
    first, second = random_tokens(1, 5), random_tokens(1, 8, seed=1)
    packed = hidden(
        config,
        weights,
        adapter,
        jnp.concatenate([first, second], 1),
        segments=jnp.asarray([[1] * 5 + [2] * 8]),
    )
    np.testing.assert_allclose(packed[:, :5], hidden(config, weights, adapter, first), atol=2e-5)
    np.testing.assert_allclose(packed[:, 5:], hidden(config, weights, adapter, second), atol=2e-5)


def test_positions_begin_after_the_padding_token(config, weights, hidden, random_tokens):
    tokens, table = random_tokens(1, 4), weights["positions"]
    used = table.at[config.padding + 1 : config.padding + 5].add(1.0)
    unused = table.at[: config.padding + 1].add(1.0).at[config.padding + 5 :].add(1.0)
    plain = hidden(config, weights, {}, tokens)
    same = hidden(config, {**weights, "positions": unused}, {}, tokens)
    np.testing.assert_array_equal(plain, same)
    # LayerNorm forgets what is added to every feature, so the change differs by feature.
    tilted = {**weights, "positions": used * jnp.linspace(0.5, 1.5, config.width)}
    assert not np.allclose(plain, hidden(config, tilted, {}, tokens), atol=0.1)


def test_the_first_token_type_counts_and_no_other(config, weights, hidden, random_tokens):
    tokens, table = random_tokens(1, 4), weights["token_types"]
    plain = hidden(config, weights, {}, tokens)
    for row, counts in ((0, True), (1, False)):
        changed = {**weights, "token_types": table.at[row, :5].add(1.0)}
        differs = not np.allclose(plain, hidden(config, changed, {}, tokens), atol=1e-2)
        assert differs == counts


def test_a_position_that_was_never_learned_gives_nothing(config, weights, hidden, random_tokens):
    with pytest.raises(InputError, match="25 tokens: this base model has learned 24 positions"):
        models.forward(config, weights, {}, random_tokens(1, 25))
    tokens, at = random_tokens(1, 3), jnp.array([[0, 1, 24]])
    assert np.isnan(hidden(config, weights, {}, tokens, positions=at)).all()
    assert np.isfinite(hidden(config, weights, {}, tokens, positions=at.at[0, 2].set(23))).all()


def test_every_projection_of_an_adapter_counts(config, weights, random_lora, random_tokens):
    adapter, tokens = random_lora(config, targets=["all-linear"]), random_tokens(1, 6)
    full = labels(config, weights, adapter, tokens)
    for path, module in adapter.items():
        less = adapter | {path: module.replace(b=0 * module.b)}
        assert not np.allclose(labels(config, weights, less, tokens), full, atol=1e-4), path


def test_layouts_of_ia3(config, weights, random_ia3, random_tokens):
    """PEFT's "output.dense" is by its suffix rule the attention's output too."""
    assert random_ia3(config, layout="peft").keys() == {
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "output.dense",
    }
    pem = random_ia3(config, layout="pem")
    assert pem.keys() == {"attention.self.key", "attention.self.value", "intermediate.dense"}
    assert {module.on for module in pem.values()} == {"output"}


def test_a_head_of_ones_own_takes_the_bases_place(config, weights, random_lora, random_tokens):
    tokens, random = random_tokens(2, 5), np.random.default_rng(0)
    head = {path: random.standard_normal(weights[path].shape) for path in models.head_paths(config)}
    head = {path: jnp.asarray(value, jnp.float32) for path, value in head.items()}
    adapter = random_lora(config, targets=["query"])
    whole = labels(config, weights | head, adapter, tokens)
    saved = adapter | {path: Saved(value) for path, value in head.items()}
    np.testing.assert_allclose(labels(config, weights, saved, tokens), whole, atol=1e-5)
    merged = merge.merge(weights, saved)
    np.testing.assert_allclose(labels(config, merged, {}, tokens), whole, atol=1e-4)


def test_a_head_may_have_labels_of_its_own(config, weights, random_tokens):
    head = {
        path: Saved(jnp.ones((*weights[path].shape[:-1], 5)))
        for path in ("classifier.out_proj", "classifier.out_proj.bias")
    }
    assert labels(config, weights, head, random_tokens(2, 5)).shape == (2, 5)


def test_a_lora_of_the_head_is_its_merged_weight(config, weights, random_tokens):
    tokens, random = random_tokens(2, 5), jax.random.key(0)
    factors = jax.random.normal(random, (32, 2)), jax.random.normal(random, (2, 3))
    adapter = {"classifier.out_proj": LoRA(*factors, 0.5)}
    merged = merge.merge(weights, adapter)
    ours = labels(config, weights, adapter, tokens)
    np.testing.assert_allclose(ours, labels(config, merged, {}, tokens), atol=1e-4)
    assert not np.allclose(ours, labels(config, weights, {}, tokens), atol=0.1)


def test_a_classifier_is_asked_for_no_tokens(config, weights):
    assert models.kind(config) == "classifier"
    with pytest.raises(InputError, match="roberta is a classifier: it gives no chances of tokens"):
        models.unembedding(config, weights, {})
    with pytest.raises(InputError, match="has no cache; take a causal base"):
        models.new_cache(config, 1, 8)
    with pytest.raises(InputError, match="no projection unembed"):
        models.forward(config, weights, {"unembed": LoRA(0, 0)}, jnp.ones((1, 2), jnp.int32))


def test_a_checkpoint_without_a_head_gets_the_same_new_one(config, weights, folder):
    def masked_lm(tensors):
        kept = {n: t for n, t in tensors.items() if not n.startswith("classifier")}
        return kept | {
            "lm_head.dense.weight": np.zeros((2, 2), np.float32),
            "roberta.pooler.dense.bias": np.zeros(2, np.float32),
        }

    loaded, again = folder(masked_lm), folder(lambda tensors: tensors)
    np.testing.assert_array_equal(loaded["embed"], weights["embed"])
    for path, leaf in models.table(config).items():
        if leaf.new is not None:
            np.testing.assert_array_equal(loaded[path], again[path])
            np.testing.assert_array_equal(loaded[path], new_weight(path, leaf))
    assert 0.015 < np.std(loaded["classifier.dense"]) < 0.025
    assert not loaded["classifier.dense.bias"].any()
    assert not np.allclose(loaded["classifier.dense"], weights["classifier.dense"], atol=0.01)


def test_half_a_head_is_refused(folder):
    with pytest.raises(InputError, match=r"classifier\.dense\.bias is missing"):
        folder(lambda tensors: {n: t for n, t in tensors.items() if n != "classifier.dense.bias"})


def test_names_may_leave_out_the_prefix(config, weights, folder):
    loaded = folder(lambda tensors: {n.removeprefix("roberta."): t for n, t in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, weights))


def test_configs_round_trip(config):
    for one in (config, replace(config, padding=0, eps=1e-5, spread=0.1, activation="relu")):
        raw = models.config_to_huggingface(one)
        assert models.config_from_huggingface(raw) == one


def test_labels_without_names_have_transformers_names():
    def named(**options):
        return models.config_from_huggingface(BASE | options).labels

    assert named() == ("LABEL_0", "LABEL_1")
    assert named(num_labels=3) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert named(id2label={"1": "b", "0": "a"}) == ("a", "b")
    many = {str(n): f"label {n}" for n in range(12)}
    assert named(id2label=many) == tuple(many.values())


def test_what_a_config_asks_in_vain_is_told_at_once():
    raw = BASE | {"hidden_act": "mish", "is_decoder": True, "problem_type": "regression"}
    raw |= {"position_embedding_type": "relative_key", "num_attention_heads": 7}
    del raw["vocab_size"]
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    for part in ("vocab_size is", "'mish'", "is_decoder True", "'regression'", "relative", "7"):
        assert part in str(caught.value)

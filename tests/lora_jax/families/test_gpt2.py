from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, modules, peft, table
from lora_jax.errors import InputError
from lora_jax.families import gpt2
from lora_jax.files import read_json


@pytest.fixture(scope="module")
def config():
    return gpt2.Config(264, 32, 64, layers=2, heads=4, context=8)


@pytest.fixture(scope="module")
def weights(config, random_weights):
    return random_weights(config)


def test_a_text_longer_than_the_positions_is_refused(config, weights):
    with pytest.raises(InputError, match=r"a text of 9 tokens: .* has learned 8 positions"):
        models.forward(config, weights, {}, jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(InputError, match="a text of 9 tokens"):
        jax.eval_shape(lambda x: models.forward(config, weights, {}, x), jnp.zeros((2, 9), int))


def test_short_texts_in_a_long_row_are_not(config, weights, hidden, random_tokens):
    tokens, segments = random_tokens(1, 12), jnp.asarray([[1] * 5 + [2] * 6 + [0]])
    packed = hidden(config, weights, {}, tokens, segments=segments)
    alone = hidden(config, weights, {}, tokens[:, 5:11])
    np.testing.assert_allclose(packed[:, 5:11], alone, atol=2e-5)


def test_what_only_the_data_show_to_be_too_long_comes_to_nothing(
    config, weights, hidden, random_tokens
):
    """Position 8 does not exist; the other row is none the worse."""
    tokens, segments = random_tokens(2, 12), jnp.asarray([[1] * 9 + [2] * 3, [1] * 8 + [2] * 4])
    packed = hidden(config, weights, {}, tokens, segments=segments)
    assert jnp.isnan(packed[0, 8:]).all()
    alone = hidden(config, weights, {}, tokens[1:], segments=segments[1:])
    np.testing.assert_allclose(packed[1:], alone, atol=2e-5)


def test_positions_are_learned_and_not_relative(config, weights, hidden, random_tokens):
    tokens = random_tokens(1, 5)
    first, later = (
        hidden(config, weights, {}, tokens, positions=jnp.arange(start, start + 5)[None])
        for start in (0, 3)
    )
    assert not np.allclose(first, later, atol=1e-2)
    rolled = {**weights, "positions": jnp.roll(weights["positions"], 3, axis=0)}
    again = hidden(config, rolled, {}, tokens, positions=jnp.arange(3, 8)[None])
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_scaling_by_layer_divides_the_queries(config, weights, hidden, random_tokens):
    """The second layer's by two."""
    by_layer = replace(config, scaled_by_layer=True)
    tokens, width = random_tokens(1, 6), config.width
    layers = dict(weights["layers"])
    for name in ("attn.c_attn", "attn.c_attn.bias"):
        layers[name] = layers[name].at[1, ..., :width].divide(2)
    halved = hidden(config, {**weights, "layers": layers}, {}, tokens)
    np.testing.assert_allclose(hidden(by_layer, weights, {}, tokens), halved, atol=1e-5)
    assert not np.allclose(halved, hidden(config, weights, {}, tokens), atol=1e-3)


def test_unscaled_attention_is_without_the_root_of_the_head_width(
    config, weights, hidden, random_tokens
):
    tokens, layers = random_tokens(1, 6), dict(weights["layers"])
    for name in ("attn.c_attn", "attn.c_attn.bias"):
        layers[name] = layers[name].at[..., : config.width].multiply(8**0.5)
    sharper = hidden(config, {**weights, "layers": layers}, {}, tokens)
    plain = hidden(replace(config, scaled=False), weights, {}, tokens)
    np.testing.assert_allclose(plain, sharper, atol=1e-5)


def test_kernels_are_stored_as_they_are_here(config):
    for leaf in table.kernels(models.table(config)).values():
        assert leaf.stored_shape() == leaf.shape[1:]


def test_modules_go_where_peft_and_pem_put_them(config):
    sizes = models.projections(config)
    lora = modules.init_lora(
        jax.random.key(0), sizes, targets=models.default_targets(config), rank=2, alpha=1
    )
    assert list(lora) == ["attn.c_attn"]
    peft, pem = (modules.init_ia3(sizes, models.ia3_layouts(config)[k]) for k in ("peft", "pem"))
    assert {path: (m.on, m.offset.shape) for path, m in peft.items()} == {
        "attn.c_attn": ("output", (2, 96)),
        "mlp.c_proj": ("input", (2, 64)),
    }
    assert {path: m.on for path, m in pem.items()} == {
        "attn.c_attn": "output",
        "mlp.c_fc": "output",
    }


def test_peft_is_told_how_the_kernels_are_stored(tmp_path, config, random_lora):
    """Its tensors are as for any other base; `fan_in_fan_out` says that the base's are not."""
    for name, targets in {"usual": ["attn.c_attn"], "one of two": ["mlp.c_proj"]}.items():
        adapter = random_lora(config, targets=targets)
        peft.save_adapter(tmp_path / name, adapter, config)
        settings = read_json(tmp_path / name / "adapter_config.json")
        assert settings["fan_in_fan_out"] is True
        assert settings["target_modules"] == ["c_attn" if name == "usual" else "mlp.c_proj"]
        loaded = peft.load_adapter(tmp_path / name, config)
        assert (loaded[targets[0]].a == adapter[targets[0]].a).all()


def test_what_a_config_leaves_unsaid_is_as_transformers_has_it():
    raw = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = models.config_from_huggingface(raw | {"n_positions": 5, "n_inner": None})
    assert config == gpt2.Config(9, 8, 32, 1, 2, 5, "gelu_new", 1e-5, True, True, False)


def test_what_a_config_asks_in_vain_is_told_at_once(config):
    raw = models.config_to_huggingface(config)
    del raw["vocab_size"]
    raw |= {"activation_function": "mish", "add_cross_attention": True, "n_head": 5}
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there/config.json")
    message = str(caught.value)
    assert message.startswith("there/config.json: ")
    for part in ("vocab_size is missing", "'mish'", "add_cross_attention", "into 5 heads (n_head)"):
        assert part in message

"""What a `config.json` can hold that is not what a family needs: one error, never another."""

import json
from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest

from lora_jax import models, table
from lora_jax.errors import InputError
from lora_jax.families import gemma3, gpt2, llama, phi, phi3, roberta, t5
from lora_jax.rope import Rope

FACTORS = (1.0, 1.5, 2.0, 3.0)
CONFIGS = {
    "llama": llama.Config("llama", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8, 5e5, "llama3", 8.0, 32)),
    "mistral": llama.Config("mistral", 264, 32, 64, 2, 4, 2, 8, 128, Rope(8), window=9),
    "qwen3": llama.Config(
        "qwen3",
        264,
        32,
        64,
        2,
        4,
        2,
        8,
        128,
        Rope(8, kind="dynamic", context=128),
        qk_norm=True,
        window=9,
    ),
    "phi": phi.Config(264, 32, 64, 2, 4, 4, 128, Rope(4, 1e4, "yarn", 4.0, 32)),
    "phi3": phi3.Config(
        264, 32, 64, 2, 4, 2, 8, 128, Rope(8, 1e4, "longrope", 1.0, 32, short=FACTORS, long=FACTORS)
    ),
    "gpt2": gpt2.Config(264, 32, 64, 2, 4, 128),
    "gemma3": gemma3.Config(
        264, 32, 64, 2, 4, 1, 8, 128, (True, False), Rope(8, 1e6, "linear", 8.0), Rope(8)
    ),
    "roberta": roberta.Config(264, 32, 56, 2, 4, 24, ("a", "b")),
    "t5": t5.Config(264, 32, 48, encoder_layers=2, layers=3, heads=4, head_width=6, buckets=8),
}
OTHERS = (None, "text", "8", [], ["a"], [None], {}, {"a": 1}, True, -1, 0, 1, 1.5, 7, 1e999)
MORE = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {},
    "sliding_window_pattern": 6,
    "num_labels": 2,
    "n_inner": 5,
    "partial_rotary_factor": 0.5,
}


def spoiled(raw):
    """A config with one value at a time replaced, inside the tables in it too."""
    for key, value in raw.items():
        yield from ({**raw, key: other} for other in OTHERS)
        if isinstance(value, dict):
            yield from ({**raw, key: inner} for inner in spoiled(value))


@lru_cache
def run(config):
    """A forward pass in the shapes of a config."""
    weights = table.abstract(models.table(config))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def states(weights, tokens):
        if models.kind(config) != "encoder-decoder":
            return models.forward(config, weights, {}, tokens).hidden
        memory = models.encode(config, weights, {}, tokens)
        return models.forward(config, weights, {}, tokens, memory=memory).hidden

    return jax.eval_shape(states, weights, tokens).shape


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_refused_by_name_or_makes_a_model(name):
    whole, refused = models.config_to_huggingface(CONFIGS[name]), 0
    assert models.config_from_huggingface(json.loads(json.dumps(whole))) == CONFIGS[name]
    for raw in spoiled(MORE | whole):
        try:
            config = models.config_from_huggingface(raw, "there")
        except InputError as error:
            refused += 1
            assert str(error).startswith(("there: ", "longrope: "))
        else:
            assert run(config)[:2] == (1, 1)
    assert refused > 100


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama", {"hidden_size": None}, "hidden_size is None, not a whole number from 1"),
        ("llama", {"hidden_size": "32"}, "hidden_size is '32', not a whole number"),
        ("llama", {"num_key_value_heads": 3}, "4 heads do not share 3 num_key_value_heads evenly"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"head_dim": 7}, "heads are 7 wide; their halves turn in pairs"),
        ("llama", {"tie_word_embeddings": "false"}, "is 'false', not true or false"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number over 0"),
        ("llama", {"rms_norm_eps": 10**400}, "not a number over 0"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ("llama", {"rope_scaling": {"type": None}}, "rope scaling None is not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "8"}}, "factor is '8'"),
        ("llama", {"layer_types": 3}, "layer_types 3 is not a list"),
        ("llama", {"model_type": ["llama"]}, "model_type ['llama'] is not one of llama"),
        ("roberta", {"pad_token_id": None}, "pad_token_id is None"),
        ("roberta", {"id2label": ["a", "b"]}, "id2label is ['a', 'b'], not an object"),
        ("roberta", {"id2label": {"x": "a"}}, "id2label is not texts by the numbers from 0 to 0"),
        ("t5", {"feed_forward_proj": None}, "feed_forward_proj None is not supported"),
        ("roberta", {"max_position_embeddings": 2}, "has no place for a token"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, not a number over"),
        ("t5", {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3"),
        ("t5", {"relative_attention_max_distance": 4}, "reaches no further than half of the 8"),
        ("t5", {"d_kv": -1, "d_ff": 1.5}, "d_ff is 1.5"),
    ],
)
def test_what_is_amiss_is_told_with_its_value(name, change, told):
    raw = models.config_to_huggingface(CONFIGS[name]) | change
    with pytest.raises(InputError) as caught:
        models.config_from_huggingface(raw, "there")
    assert told in str(caught.value)


def test_a_base_in_few_bits_is_refused_with_the_remedy():
    raw = models.config_to_huggingface(CONFIGS["llama"])
    raw |= {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    told = "there: quantization_config: .* take the unquantized folder, with --quantize"
    with pytest.raises(InputError, match=told):
        models.config_from_huggingface(raw, "there")


def test_t5_keeps_its_padding_and_starts_with_it_unless_told():
    raw = models.config_to_huggingface(CONFIGS["t5"]) | {"pad_token_id": 5}
    for start, wanted in ((7, 7), (0, 0), (None, 5)):
        config = models.config_from_huggingface(raw | {"decoder_start_token_id": start})
        assert models.start_token(config) == wanted
        assert models.config_to_huggingface(config)["pad_token_id"] == 5

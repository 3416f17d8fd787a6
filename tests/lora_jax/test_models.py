import jax
import jax.numpy as jnp
import pytest

from lora_jax import models
from lora_jax.errors import InputError


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"there: model_type 'mamba' is not one of llama, mistral"):
        models.config_from_huggingface({"model_type": "mamba"}, "there")
    with pytest.raises(InputError, match="model_type None"):
        models.config_from_huggingface({})


def test_the_tables_projections_are_the_ones_a_module_can_change(config):
    table = models.table(config)
    for path, sizes in models.projections(config).items():
        assert table[f"layers.{path}"].shape == sizes


def test_a_batch_of_a_known_shape_does_not_compile_again(
    config, weights, random_lora, random_tokens
):
    traces = []

    @jax.jit
    def states(adapter, tokens):
        traces.append(tokens.shape)
        return models.forward(config, weights, adapter, tokens).hidden

    for seed in range(3):
        states(random_lora(config, seed), random_tokens(2, 6, seed=seed))
    assert states._cache_size() == len(traces) == 1
    states(random_lora(config), random_tokens(2, 7))
    assert states._cache_size() == len(traces) == 2


def test_configs_that_are_equal_share_a_program(config):
    assert hash(config) == hash(
        models.config_from_huggingface(models.config_to_huggingface(config))
    )


def test_logits_come_in_the_compute_type(config, weights):
    states = jnp.ones((1, config.width), jnp.bfloat16)
    assert models.unembed(config, weights, {}, states).dtype == jnp.bfloat16
    assert models.unembedding(config, weights, {}).kernel.shape == (config.width, config.vocabulary)

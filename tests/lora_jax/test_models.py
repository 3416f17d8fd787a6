import jax
import jax.numpy as jnp
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Experts


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"there: model_type 'mamba' is not one of llama, mistral"):
        models.config_from_huggingface({"model_type": "mamba"}, "there")
    with pytest.raises(InputError, match="model_type None"):
        models.config_from_huggingface({})


def test_the_tables_projections_are_the_ones_a_module_can_change(config):
    table = models.table(config)
    for path, sizes in models.projections(config).items():
        assert table[f"layers.{path}"].shape == sizes


@pytest.mark.parametrize(
    "module",
    [IA3(jnp.ones(32)), Experts(jnp.ones((2, 264, 3)), jnp.ones((2, 3, 32)), jnp.ones((2, 264)))],
)
def test_a_module_that_no_embedding_takes_is_refused(config, weights, random_tokens, module):
    with pytest.raises(InputError, match="embed: the embedding takes LoRA, DoRA or a whole weight"):
        models.forward(config, weights, {"embed": module}, random_tokens(1, 3))


def test_a_causal_model_reads_no_source(config, weights, random_tokens):
    with pytest.raises(InputError, match="causal models have no encoder to read a source with"):
        models.encode(config, weights, {}, random_tokens(1, 3))


def test_a_routed_unembedding_is_refused(config, weights):
    experts = Experts(jnp.ones((2, 32, 3)), jnp.ones((2, 3, 264)), jnp.ones((2, 32)))
    with pytest.raises(InputError, match="unembedding cannot be routed; leave lm_head out of the"):
        models.unembedding(config, weights, {"unembed": experts})


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

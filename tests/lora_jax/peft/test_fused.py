from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.families import phi3
from lora_jax.merge import merge
from lora_jax.modules import IA3, DoRA, LoRA
from lora_jax.rope import Rope

SPLIT = ("q_proj", "v_proj", "gate_proj", "up_proj", "o_proj")


@pytest.fixture
def fused_config(config):
    """A Phi-3 of the tiny Llama's sizes, which has q, k and v in one, and gate and up."""
    shared = ("vocabulary", "width", "hidden", "layers", "heads", "kv_heads", "head_width")
    sizes = {name: getattr(config, name) for name in shared}
    return phi3.Config(**sizes, context=config.context, rope=Rope(8), eps=config.eps, tied=True)


@pytest.fixture
def as_one(config):
    """A function that puts a Llama's weights together as a Phi-3 has them."""

    def join(weights):
        parts = dict(weights["layers"])
        q, k, v, gate, up = (
            parts.pop(f"{stem}_proj")
            for stem in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        )
        parts["self_attn.qkv_proj"] = jnp.concatenate([q, k, v], axis=-1)
        parts["mlp.gate_up_proj"] = jnp.concatenate([gate, up], axis=-1)
        return {**weights, "layers": parts}

    return join


def doras(adapter):
    """The adapter with a random magnitude on each."""
    row = lambda m: 0.5 + jax.random.uniform(jax.random.key(3), m.b[:, 0].shape)  # noqa: E731
    return {path: DoRA(m.a, m.b, row(m), m.scale) for path, m in adapter.items()}


def biased(adapter):
    """The adapter with a random bias on each."""
    row = lambda m: jax.random.normal(jax.random.key(4), m.b[:, 0].shape)  # noqa: E731
    return {path: replace(m, bias=row(m)) for path, m in adapter.items()}


def outputs(config, weights, adapter, tokens):
    """The logits of tokens."""
    hidden = models.forward(config, weights, adapter, tokens).hidden
    return models.unembed(config, weights, adapter, hidden)


KINDS = {"lora": lambda x: x, "dora": doras, "lora_bias": biased}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_parts_loads_into_a_fused_base(
    folder, config, weights, fused_config, as_one, random_lora, random_tokens, kind
):
    """Parts of unequal rank and scale, and none for k."""
    adapter = random_lora(config, targets=SPLIT, rank=3)
    adapter |= random_lora(config, targets=["v_proj"], rank=2, alpha=1.0)
    adapter, tokens = KINDS[kind](adapter), random_tokens(1, 6)
    loaded = folder(adapter).load(fused_config)
    ranks = {path: module.a.shape[-1] for path, module in loaded.items()}
    assert ranks == {"self_attn.qkv_proj": 5, "self_attn.o_proj": 3, "mlp.gate_up_proj": 6}
    want = outputs(config, weights, adapter, tokens)
    got = outputs(fused_config, as_one(weights), loaded, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_adapter_loads_into_a_base_in_parts(
    folder, config, weights, fused_config, as_one, random_lora, random_tokens, kind
):
    adapter = random_lora(fused_config, targets=["qkv_proj", "gate_up_proj", "down_proj"])
    adapter, tokens = KINDS[kind](adapter), random_tokens(1, 6)
    loaded = folder(adapter, fused_config).load(config)
    assert list(loaded) == [p for p in models.projections(config) if "o_proj" not in p]
    want = outputs(fused_config, as_one(weights), adapter, tokens)
    np.testing.assert_allclose(outputs(config, weights, loaded, tokens), want, atol=1e-4)


def test_equal_deltas(folder, config, fused_config, as_one, random_lora, weights):
    nothing = jax.tree.map(jnp.zeros_like, weights)
    adapter = random_lora(config, targets=["q_proj", "k_proj", "v_proj"])
    delta = merge(as_one(nothing), folder(adapter).load(fused_config))["layers"]
    want = as_one(merge(nothing, adapter))["layers"]
    np.testing.assert_allclose(delta["self_attn.qkv_proj"], want["self_attn.qkv_proj"], atol=1e-6)


def test_ia3_of_the_parts_and_of_the_whole(
    folder, config, weights, fused_config, as_one, random_ia3, random_tokens
):
    tokens = random_tokens(1, 6)
    adapter = random_ia3(config, layout="pem")
    want = outputs(config, weights, adapter, tokens)
    loaded = folder(adapter).load(fused_config)
    got = outputs(fused_config, as_one(weights), loaded, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
    back = folder(loaded, fused_config).load(config)
    np.testing.assert_allclose(outputs(config, weights, back, tokens), want, atol=1e-4)


def test_one_parts_input_cannot_be_rescaled_where_they_are_fused(folder, config, fused_config):
    made = folder({"self_attn.q_proj": IA3(jnp.ones((config.layers, 32)), "input")})
    assert "self_attn.qkv_proj: the base fuses it, and cannot rescale" in made.refusal(fused_config)


def test_layers_without_parts_stay_without(folder, config, fused_config, random_lora):
    adapter = random_lora(config, targets=["q_proj"])
    some = {path: jax.tree.map(lambda x: x.at[0].set(0), m) for path, m in adapter.items()}
    loaded = folder(some).load(fused_config)["self_attn.qkv_proj"]
    assert not loaded.a[0].any() and loaded.b[1, :, :32].any() and not loaded.b[1, :, 32:].any()


def test_all_linear_means_what_the_file_has(folder, config, fused_config, random_lora):
    made = folder(random_lora(config, targets=["all-linear"]))
    made.edit(target_modules="all-linear")
    assert list(made.load(fused_config)) == list(models.projections(fused_config))


def test_a_width_that_is_not_the_bases_is_refused(folder, config, fused_config, random_lora):
    made = folder(random_lora(config, targets=["q_proj"]))
    wider = replace(fused_config, heads=8)
    assert "q_proj maps 32 to 32, the base 32 to 64" in made.refusal(wider)


def test_a_dora_of_some_parts_has_columns_that_peft_cannot_hold(
    folder, config, fused_config, random_lora
):
    loaded = folder(doras(random_lora(config, targets=["q_proj"]))).load(fused_config)
    assert isinstance(loaded["self_attn.qkv_proj"], DoRA)
    with pytest.raises(InputError, match="has a 0, which stands for the norm of a base's column"):
        folder(loaded, fused_config)
    whole = folder(random_lora(config, targets=["q_proj"])).load(fused_config)
    assert isinstance(whole["self_attn.qkv_proj"], LoRA)
    assert folder(whole, fused_config).load()

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.merge import merge, unmerge
from lora_jax.modules import IA3, Experts, LoRA, Saved

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("layers", "rank"), [(1, 1), (2, 3), (3, 9)])
@pytest.mark.parametrize("kind", ["lora", "peft", "pem"])
def test_a_merged_base_equals_the_adapted_base(
    config, random_weights, random_lora, random_ia3, random_tokens, hidden, layers, rank, kind
):
    config = replace(config, layers=layers, qkv_bias=True, output_bias=True, mlp_bias=True)
    weights, tokens = random_weights(config), random_tokens(2, 6)
    lora = random_lora(config, targets=ALL, rank=rank)
    adapter = lora if kind == "lora" else random_ia3(config, layout=kind)
    merged = hidden(config, merge(weights, adapter), {}, tokens)
    np.testing.assert_allclose(merged, hidden(config, weights, adapter, tokens), atol=1e-4)
    assert not np.allclose(merged, hidden(config, weights, {}, tokens), atol=0.1)


@pytest.mark.parametrize("kind", ["lora", "peft", "pem"])
def test_unmerging_undoes_merging(config, weights, random_lora, random_ia3, kind):
    adapter = (
        random_lora(config, targets=ALL) if kind == "lora" else random_ia3(config, layout=kind)
    )
    back = unmerge(merge(weights, adapter), adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, weights)


def test_merging_nothing_is_the_base_and_leaves_the_given_weights_alone(
    config, weights, random_lora
):
    before = jax.tree.map(jnp.copy, weights)
    merge(weights, random_lora(config))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), weights, before))
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, merge(weights, {}), weights))


def test_merging_keeps_the_bases_type_and_adds_in_float32(config, weights, random_lora):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    adapter = random_lora(config)
    merged = merge(half, adapter)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    wide = merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), adapter)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), merged, rounded))


def test_routed_experts_have_no_single_kernel(config, weights):
    expert = Experts(*(jnp.ones((2, 3, 4, 4)),) * 2, prototypes=jnp.ones((2, 3, 4)))
    with pytest.raises(InputError, match=r"self_attn\.q_proj: Experts cannot be merged"):
        merge(weights, {"self_attn.q_proj": expert})


def test_a_lora_bias_is_merged_into_the_bases_bias(
    config, random_weights, random_lora, random_tokens, hidden
):
    config = replace(config, qkv_bias=True)
    weights, tokens = random_weights(config), random_tokens(1, 5)
    lora = random_lora(config, targets=["q_proj", "v_proj"])
    adapter = {path: replace(m, bias=jnp.full(m.b[:, 0].shape, 0.3)) for path, m in lora.items()}
    want = hidden(config, weights, adapter, tokens)
    assert not np.allclose(want, hidden(config, weights, lora, tokens), atol=0.01)
    merged = merge(weights, adapter)
    np.testing.assert_allclose(hidden(config, merged, {}, tokens), want, atol=1e-4)
    back = unmerge(merged, adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, weights)


def test_a_lora_bias_needs_a_bias_in_the_base(config, weights, random_lora):
    module = random_lora(config)["self_attn.q_proj"]
    biased = {"self_attn.q_proj": replace(module, bias=jnp.ones((2, 32)))}
    with pytest.raises(InputError, match=r"q_proj: its lora_bias has no bias in the base"):
        merge(weights, biased)


HEADS = {
    "embed": LoRA(jnp.full((264, 1), 0.2), jnp.linspace(0, 1, 32)[None]),
    "unembed": LoRA(jnp.full((32, 1), 0.2), jnp.linspace(0, 1, 264)[None]),
    "unembed, with a bias": LoRA(jnp.ones((32, 1)), jnp.zeros((1, 264)), 2.0, jnp.arange(264.0)),
    "unembed, rescaled": IA3(jnp.linspace(0, 1, 264)),
    "unembed, its input rescaled": IA3(jnp.linspace(0, 1, 32), "input"),
}


@pytest.mark.parametrize("name", HEADS)
def test_each_side_of_one_embedding_changes_for_itself(
    config, weights, random_tokens, hidden, name
):
    """Before merging as after it; what has no bias to go to stays an adapter."""
    path, tokens = name.split(",")[0], random_tokens(1, 5)
    adapter, plain = {path: HEADS[name]}, hidden(config, weights, {}, tokens)
    states = hidden(config, weights, adapter, tokens)
    assert np.allclose(states, plain, atol=1e-6) == (path == "unembed")
    got, old = (models.unembed(config, weights, a, states) for a in (adapter, {}))
    assert np.allclose(got, old, atol=1e-6) == (path == "embed")
    if HEADS[name] is HEADS["unembed, with a bias"]:
        added = np.broadcast_to(2 * np.arange(264), got.shape)
        np.testing.assert_allclose(got - old, added, atol=1e-3)
        return
    merged = merge(weights, adapter)
    after = models.unembed(config, merged, {}, hidden(config, merged, {}, tokens))
    np.testing.assert_allclose(after, got, atol=1e-4)


def test_what_replaced_a_weight_cannot_be_taken_out_again(weights):
    with pytest.raises(InputError, match=r"nothing can take norm \(Saved\) out of a base again"):
        unmerge(weights, {"norm": Saved(weights["norm"])})


def test_a_module_without_a_place_is_refused(config, weights, random_lora):
    with pytest.raises(InputError, match=r"no projection mlp\.fc1"):
        merge(weights, {"mlp.fc1": random_lora(config)["mlp.down_proj"]})


def test_merging_is_differentiable(config, weights, random_lora, random_tokens):
    """A gradient through the merged kernels is the adapter's own gradient."""
    adapter, tokens = random_lora(config), random_tokens(1, 5)

    def loss(weights, adapter):
        return jnp.sum(models.forward(config, weights, adapter, tokens).hidden ** 2)

    inside = jax.jit(jax.grad(lambda a: loss(merge(weights, a), {})))(adapter)
    beside = jax.jit(jax.grad(lambda a: loss(weights, a)))(adapter)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), inside, beside
    )

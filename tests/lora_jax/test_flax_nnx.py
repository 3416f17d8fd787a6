"""A user's NNX model under modules computes what it does with the merged kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import flax_nnx
from lora_jax.dora import with_magnitudes
from lora_jax.errors import InputError

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.inner(jnp.tanh(x))


class Model(nnx.Module):
    """Every kind of layer that has a kernel; one is shared, some are stacked."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.again = self.blocks[0]
        self.stack = nnx.vmap(Block)(nnx.Rngs(jax.random.split(rngs(), 3)))
        self.split = nnx.Einsum("btd,hdk->bthk", (2, 8, 4), (2, 4), rngs=rngs)
        self.join = nnx.Einsum("...hk,hkd->...d", (2, 4, 8), rngs=rngs)
        self.scaled = nnx.Einsum("btd,td->btd", (3, 8), rngs=rngs)
        self.conv = nnx.Conv(8, 4, (1,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(x)
        for block in (*self.blocks, self.again):
            x = nnx.remat(lambda block, x: block(x))(block, x)
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.stack
        )
        return self.conv(self.scaled(self.join(self.split(x))))


SHAPES = {
    "attn.query": (8, 8),
    "attn.key": (8, 8),
    "attn.value": (8, 8),
    "attn.out": (8, 8),
    "again.inner": (8, 8),
    "blocks.1.inner": (8, 8),
    "stack.inner": (3, 8, 8),
    "split": (8, 8),
    "join": (8, 8),
}


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapters(model, loras, ia3s):
    """A random module of each kind on every layer that can have one."""
    lora = loras(SHAPES)
    dora = with_magnitudes(lora, flax_nnx.kernels(model))
    return {"lora": lora, "dora": dora, "ia3": ia3s(SHAPES)}


def test_shapes_are_those_of_every_plain_layer_once(model):
    assert flax_nnx.shapes(model) == SHAPES


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_modules_do_what_merged_kernels_do_and_the_users_stay(model, adapters, kind):
    before = jax.tree.map(np.asarray, nnx.state(model))

    @jax.jit
    def outputs(model, adapter):
        changed, merged = flax_nnx.apply(model, adapter), flax_nnx.merge(model, adapter)
        return changed(X), merged(X), model(X)

    got, want, base = outputs(model, adapters[kind])
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert abs(got - base).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert type(model.split) is nnx.Einsum and flax_nnx.shapes(model) == SHAPES


def test_a_gradient_to_the_adapter_is_the_one_through_merged_kernels(model, adapters):
    def loss(adapter, put):
        return jnp.sum(put(model, adapter)(X) ** 2)

    @jax.jit
    def gradients(adapter):
        return [jax.grad(loss)(adapter, put) for put in (flax_nnx.apply, flax_nnx.merge)]

    got, want = gradients(adapters["lora"])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3), got, want)


def test_no_module_is_the_model_itself(model):
    block = model.blocks[0]
    assert (flax_nnx.apply(block, {})(X) == block(X)).all()


def test_a_changed_model_splits_jits_and_keeps_what_its_layers_are(model, loras):
    adapter = loras({"inner": (8, 8)})
    changed = flax_nnx.apply(model.blocks[0], adapter)
    assert isinstance(changed.inner, nnx.Linear) and changed.inner.in_features == 8
    again = nnx.merge(*nnx.split(changed))
    np.testing.assert_allclose(nnx.jit(lambda m: m(X))(again), changed(X), atol=1e-5)


def test_a_layers_own_type_is_kept(loras):
    layer = nnx.Linear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapter = loras({"": (8, 4)})
    got, want = (put(layer, adapter)(X) for put in (flax_nnx.apply, flax_nnx.merge))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.1)


def test_a_kernel_that_two_layers_share_is_merged_into_one_of_them_alone(loras):
    pair = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))])
    pair[1].kernel = pair[0].kernel
    adapter = loras({"0": (8, 8)})
    for made in (flax_nnx.apply(pair, adapter), flax_nnx.merge(pair, adapter)):
        assert (made[1](X) == pair[1](X)).all() and abs(made[0](X) - pair[0](X)).max() > 0.01


@pytest.mark.parametrize(
    "path, shape, words",
    [
        ("attn.queri", (8, 8), "no projection 'attn.queri'"),
        ("conv", (8, 4), "no projection 'conv'"),
        ("scaled", (3, 8), "no projection 'scaled'"),
        ("split", (8, 9), r"split is \(8, 8\)"),
        ("stack.inner", (8, 8), r"stack.inner is \(3, 8, 8\)"),
    ],
)
def test_a_module_without_a_place_is_refused_by_name(model, loras, path, shape, words):
    for put in (flax_nnx.apply, flax_nnx.merge):
        with pytest.raises(InputError, match=words):
            put(model, loras({path: shape}))


def test_an_einsum_called_with_another_string_is_refused(model, loras):
    changed = flax_nnx.apply(model.split, loras({"": (8, 8)}))
    with pytest.raises(InputError, match="no plain contraction"):
        changed(jnp.ones((2, 8, 4)), "hdk,hdk->hdk")


class Twice(nnx.Linear):
    """A user's own layer, whose kernel is not used as flax's."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_a_subclass_with_a_call_of_its_own_is_left_out():
    assert flax_nnx.shapes(Twice(8, 4, rngs=nnx.Rngs(0))) == {}

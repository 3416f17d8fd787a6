"""A user's Linen model under modules computes what it does with the merged kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import flax_linen
from lora_jax.dora import with_magnitudes
from lora_jax.errors import InputError
from lora_jax.modules import Saved

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


class Body(nn.Module):
    """One of a stack of layers, as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="inner")(jnp.tanh(x)), None


class Model(nn.Module):
    """Every kind of layer that has a kernel, in every way that flax has of calling it."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="attn")(x)
        shared = nn.remat(nn.Dense)(8, dtype=self.dtype, name="shared")
        x = shared(jnp.tanh(shared(x)))
        scan = nn.scan(Body, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="stack")(x, None)
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        heads = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **split)
        x = x + heads(8, name="heads")(x).sum(0)
        x = nn.Einsum((2, 8, 4), "btd,hdk->bthk", name="split")(x)
        x = nn.Einsum((2, 4, 8), "...hk,hkd->...d", use_bias=False, name="join")(x)
        x = nn.Einsum((3, 8), "btd,td->btd", use_bias=False, name="scaled")(x)
        return nn.Conv(4, (1,), name="conv")(x)


SHAPES = {
    "attn.query": (8, 8),
    "attn.key": (8, 8),
    "attn.value": (8, 8),
    "attn.out": (8, 8),
    "shared": (8, 8),
    "stack.inner": (3, 8, 8),
    "heads": (2, 8, 8),
    "split": (8, 8),
    "join": (8, 8),
}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Model().init)(jax.random.key(1), X)


@pytest.fixture(scope="module")
def adapters(variables, loras, ia3s):
    """A random module of each kind on every layer that can have one."""
    lora = loras(SHAPES)
    dora = with_magnitudes(lora, flax_linen.kernels(Model(), variables, X))
    return {"lora": lora, "dora": dora, "ia3": ia3s(SHAPES)}


def test_shapes_are_those_of_every_plain_layer_and_need_no_numbers(variables):
    abstract = jax.eval_shape(Model().init, jax.random.key(1), X)
    assert flax_linen.shapes(Model(), abstract, X, train=True) == SHAPES
    kernels = flax_linen.kernels(Model(), variables, X)
    split = variables["params"]["split"]["kernel"]
    assert (kernels["split"] == jnp.moveaxis(split, 1, 0).reshape(8, 8)).all()
    assert {path: kernel.shape for path, kernel in kernels.items()} == SHAPES


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_modules_do_what_merged_kernels_do_and_the_users_stay(variables, adapters, kind):
    before = jax.tree.map(np.asarray, variables)

    @jax.jit
    def outputs(variables, adapter):
        merged = flax_linen.merge(Model(), variables, adapter, X)
        plain = [Model().apply(each, X) for each in (merged, variables)]
        return flax_linen.apply(Model(), variables, adapter, X), *plain

    got, want, base = outputs(variables, adapters[kind])
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert abs(got - base).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_no_module_is_the_model_itself(variables):
    assert (flax_linen.apply(Model(), variables, {}, X) == Model().apply(variables, X)).all()


def test_a_gradient_to_the_adapter_is_the_one_through_merged_kernels(variables, adapters):
    def direct(adapter):
        return jnp.sum(flax_linen.apply(Model(), variables, adapter, X) ** 2)

    def merged(adapter):
        return jnp.sum(Model().apply(flax_linen.merge(Model(), variables, adapter, X), X) ** 2)

    got, want = jax.jit(lambda adapter: (jax.grad(direct)(adapter), jax.grad(merged)(adapter)))(
        adapters["lora"]
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3), got, want)


def test_each_of_the_adapters_counts_its_own_layers(variables, adapters):
    """Of a stacked module the second layer's part changes the second layer alone."""
    module = adapters["lora"]["stack.inner"]
    only = module.replace(b=module.b * jnp.array([0, 1, 0])[:, None, None])
    kernel = flax_linen.merge(Model(), variables, {"stack.inner": only}, X)["params"]["stack"]
    moved = kernel["inner"]["kernel"] - variables["params"]["stack"]["inner"]["kernel"]
    assert [bool(abs(layer).max() > 0) for layer in moved] == [False, True, False]


def test_what_a_call_gives_back_of_params_holds_no_module_to_be_used_again(loras):
    model = nn.Dense(4)
    params = model.init(jax.random.key(0), X[0])
    _, state = flax_linen.apply(model, params, loras({"": (8, 4)}), X[0], mutable=True)
    assert (flax_linen.apply(model, state, {}, X[0]) == model.apply(params, X[0])).all()


def test_a_layers_own_type_is_kept(loras):
    model = nn.Dense(4, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), X)
    adapter = loras({"": (8, 4)})
    y = flax_linen.apply(model, params, adapter, X)
    want = model.apply(flax_linen.merge(model, params, adapter, X), X)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), want.astype(jnp.float32), atol=0.1)


def test_boxed_params_stay_boxed(loras):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(4, kernel_init=init)
    boxed = model.init(jax.random.key(0), X)
    merged = flax_linen.merge(model, boxed, loras({"": (8, 4)}), X)
    assert merged["params"]["kernel"].names == ("in", "out")
    got = flax_linen.apply(model, boxed, loras({"": (8, 4)}), X)
    np.testing.assert_allclose(got, model.apply(merged, X), atol=1e-5)


@pytest.mark.parametrize(
    "path, shape, words",
    [
        ("attn.queri", (8, 8), "no projection 'attn.queri'"),
        ("conv", (8, 4), "conv is a Conv"),
        ("scaled", (3, 8), "scaled is a Einsum"),
        ("split", (8, 9), r"split is \(8, 8\)"),
        ("stack.inner", (8, 8), "stack.inner: the model stacks 3 layers here"),
    ],
)
def test_a_module_without_a_place_is_refused_by_name(variables, loras, path, shape, words):
    with pytest.raises(InputError, match=words):
        flax_linen.apply(Model(), variables, loras({path: shape}), X)


def test_a_merge_refuses_what_apply_does(variables, adapters, loras):
    with pytest.raises(InputError, match="'conv'"):
        flax_linen.merge(Model(), variables, loras({"conv": (8, 4)}), X)
    kept = {"conv": Saved(jnp.zeros((1, 8, 4)))}
    with pytest.raises(InputError, match="conv is kept whole"):
        flax_linen.apply(Model(), variables, kept, X)
    biased = {"join": adapters["lora"]["join"].replace(bias=jnp.ones(8))}
    with pytest.raises(InputError, match="join: its lora_bias"):
        flax_linen.merge(Model(), variables, biased, X)


def test_a_stack_on_another_axis_is_refused_by_name():
    scan = nn.scan(Body, {"params": 1}, split_rngs={"params": True}, length=8)
    params = jax.jit(scan().init)(jax.random.key(0), X, None)
    with pytest.raises(InputError, match="inner: the model stacks its layers on axis 1"):
        flax_linen.shapes(scan(), params, X, None)


class Twice(nn.Dense):
    """A user's own layer, whose kernel flax does not use as it is."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_a_subclass_with_a_call_of_its_own_is_refused(loras):
    params = Twice(4).init(jax.random.key(0), X)
    assert flax_linen.shapes(Twice(4), params, X) == {}
    with pytest.raises(InputError, match="Twice"):
        flax_linen.apply(Twice(4), params, loras({"": (8, 4)}), X)


def test_a_lora_bias_is_added(loras):
    model, x = nn.Dense(4), X[0]
    params = model.init(jax.random.key(0), x)
    adapter = {"": loras({"": (8, 4)})[""].replace(bias=jnp.ones(4))}
    got = flax_linen.apply(model, params, adapter, x)
    merged = flax_linen.merge(model, params, adapter, x)
    np.testing.assert_allclose(got, model.apply(merged, x), atol=1e-5)

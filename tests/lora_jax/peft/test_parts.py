"""An adapter in parts: what PEFT stores of each layer, and the alphas that give its scale."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.errors import InputError
from lora_jax.modules import IA3, DoRA, LoRA
from lora_jax.peft import build, names
from lora_jax.peft.parts import Part, parts, scaled

Q = "self_attn.q_proj"
Q0, Q1 = (f"model.layers.{n}.{Q}" for n in range(2))


@pytest.fixture
def module(config, random_lora):
    """A LoRA of rank 4 on q."""
    return random_lora(config, targets=["q_proj"], rank=4, alpha=4.0)[Q]


def test_parts_are_one_a_layer_in_the_models_order_and_turned(config, random_lora):
    adapter = random_lora(config, targets=["down_proj", "q_proj"])
    found = parts(dict(reversed(adapter.items())), config)
    wanted = [f"model.layers.{n}.{path}" for path in (Q, "mlp.down_proj") for n in range(2)]
    assert list(found) == wanted
    for name, part in found.items():
        module, n = adapter[name.split(".", 3)[3]], int(name.split(".")[2])
        assert (part.rank, part.scale) == (3, module.scale)
        np.testing.assert_array_equal(part.tensors["lora_A.weight"], module.a[n].T)
        np.testing.assert_array_equal(part.tensors["lora_B.weight"], module.b[n].T)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_parts_built_again_are_the_adapter(config, random_lora, random_ia3, equal, kind):
    adapter = random_ia3(config) if kind == "ia3" else random_lora(config)
    if kind == "dora":
        adapter = {p: DoRA(m.a, m.b, 1 + m.b[:, 0] ** 2, m.scale) for p, m in adapter.items()}
    found = parts(adapter, config)
    roles = lambda tensors: {r.removesuffix(".weight"): t for r, t in tensors.items()}  # noqa: E731
    stored = {name: roles(part.tensors) for name, part in found.items()}
    scales = {name: part.scale for name, part in found.items()}
    again = build.modules(names.slots(config), stored, scales)
    if kind == "ia3":
        adapter, again = (jax.tree.map(lambda x: 1 + x, each) for each in (adapter, again))
    assert equal({path: again[path] for path in adapter}, adapter)


def test_an_embeddings_factors_have_names_of_their_own(config):
    adapter = {"embed": LoRA(jnp.ones((264, 2)), jnp.ones((2, 32)))}
    (found,) = parts(adapter, config).values()
    shapes = {role: tensor.shape for role, tensor in found.tensors.items()}
    assert shapes == {"lora_embedding_A": (2, 264), "lora_embedding_B": (32, 2)}


def test_ranks_and_layers_of_zeros_are_left_out(config, module):
    thin = replace(module, a=module.a.at[0, :, 2:].set(0), b=module.b.at[0, 2:].set(0))
    found = parts({Q: thin}, config)
    assert {name: part.rank for name, part in found.items()} == {Q0: 2, Q1: 4}
    assert found[Q0].tensors["lora_A.weight"].shape == (2, 32)
    lone = jax.tree.map(lambda x: x.at[0].set(0), module)
    assert list(parts({Q: lone}, config)) == [Q1]


def test_a_module_of_zeros_is_kept_whole(config, module):
    found = parts({Q: jax.tree.map(jnp.zeros_like, module)}, config)
    assert {name: part.rank for name, part in found.items()} == {Q0: 4, Q1: 4}


def test_a_new_module_whose_b_is_zero_is_kept_whole(config, module):
    found = parts({Q: replace(module, b=0 * module.b)}, config)
    assert {name: part.rank for name, part in found.items()} == {Q0: 4, Q1: 4}


def test_a_bias_on_one_module_is_zeros_on_the_others(config, random_lora):
    adapter = random_lora(config, targets=["q_proj", "v_proj"])
    found = parts(adapter | {Q: replace(adapter[Q], bias=jnp.ones((2, 32)))}, config)
    for name, part in found.items():
        assert (part.tensors["lora_B.bias"] == (1 if "q_proj" in name else 0)).all()
    assert not any("lora_B.bias" in part.tensors for part in parts(adapter, config).values())


@pytest.mark.parametrize(("side", "shape"), [("input", (1, 64)), ("output", (32, 1))])
def test_a_rescaling_is_a_row_for_an_input_and_a_column_for_an_output(config, side, shape):
    offset = jnp.linspace(-0.5, 0.5, 2 * max(shape)).reshape(2, -1)
    found = parts({"mlp.down_proj": IA3(offset, side)}, config)
    for n, part in enumerate(found.values()):
        assert part.tensors["ia3_l"].shape == shape
        np.testing.assert_array_equal(part.tensors["ia3_l"].reshape(-1), 1 + offset[n])


def test_a_module_that_the_base_has_no_place_for_is_refused(config):
    adapter = {path: IA3(jnp.ones((2, 64))) for path in ("mlp.fc2", "mlp.fc1")}
    with pytest.raises(InputError, match=r"this base model has no projection mlp\.fc1, mlp\.fc2$"):
        parts(adapter, config)


def part(rank, scale):
    tensors = {"lora_A.weight": np.ones((rank, 4)), "lora_B.weight": np.ones((6, rank))}
    return Part(tensors, rank, scale)


@given(st.lists(st.tuples(st.integers(1, 70), st.floats(0.01, 100)), min_size=1, max_size=4))
def test_the_alphas_give_back_the_scales_and_what_is_folded_keeps_its_delta(given):
    before = {str(n): part(*one) for n, one in enumerate(given)}
    rslora, alphas, after = scaled(before)
    for name, (rank, scale) in zip(before, given, strict=True):
        assert after[name].scale == alphas[name] / (math.sqrt(rank) if rslora else rank)
        delta = after[name].scale * after[name].tensors["lora_B.weight"].max()
        np.testing.assert_allclose(delta, scale, rtol=1e-6)


def test_scales_that_are_alphas_over_ranks_are_left_alone():
    before = {"a": part(4, 7 / 4), "b": part(3, 5 / 3)}
    assert scaled(before) == (False, {"a": 7.0, "b": 5.0}, before)


def test_scales_that_are_whole_alphas_over_roots_of_ranks_are_rsloras():
    before = {"a": part(3, 7 / math.sqrt(3)), "b": part(2, 5 / math.sqrt(2))}
    assert scaled(before) == (True, {"a": 7, "b": 5}, before)
    rslora, _, after = scaled(before | {"c": part(3, 7 / 3)})  # not all of them
    assert not rslora and after["c"].scale == 7 / 3


def test_a_scale_that_no_alpha_gives_back_is_folded():
    rank = next(r for r in range(3, 60) if (0.1 * r) / r != 0.1)
    rslora, alphas, after = scaled({"a": part(rank, 0.1)})
    assert (rslora, alphas, after["a"].scale) == (False, {"a": rank}, 1.0)
    np.testing.assert_allclose(after["a"].tensors["lora_B.weight"], 0.1, rtol=1e-6)
    assert (after["a"].tensors["lora_A.weight"] == 1).all()

"""Modules out of the tensors of their layers."""

import numpy as np
import pytest

from lora_jax.modules import IA3, DoRA, LoRA
from lora_jax.peft import build
from lora_jax.peft.names import Slot

RANDOM = np.random.default_rng(0)
SLOTS = {
    "h.0.up": Slot("up", True, (4, 6)),
    "h.0.down": Slot("down", True, (6, 4)),
    "h.1.up": Slot("up", True, (4, 6)),
    "h.1.down": Slot("down", True, (6, 4)),
    "head": Slot("unembed", False, (4, 9)),
}
ROLES = {DoRA: "lora_magnitude_vector", LoRA: "lora_B.bias"}


def draw(*shape):
    return RANDOM.standard_normal(shape, np.float32)


def lora(name, rank=2, role=""):
    """Random tensors of a LoRA, DoRA or LoRA with a bias at a place."""
    size_in, size_out = SLOTS[name].size
    row = {role: draw(size_out)} if role else {}
    return {"lora_A": draw(rank, size_in), "lora_B": draw(size_out, rank), **row}


def test_layers_are_stacked_and_turned():
    stored = {name: lora(name) for name in ("h.1.up", "h.0.up")}
    found = build.modules(SLOTS, stored, dict.fromkeys(stored, 1.5))
    assert list(found) == ["up"] and type(found["up"]) is LoRA
    assert found["up"].scale == 1.5 and found["up"].bias is None
    for n in range(2):
        np.testing.assert_array_equal(found["up"].a[n], stored[f"h.{n}.up"]["lora_A"].T)
        np.testing.assert_array_equal(found["up"].b[n], stored[f"h.{n}.up"]["lora_B"].T)


def test_what_the_model_has_once_has_no_layers():
    stored = {"head": lora("head", role="lora_B.bias")}
    found = build.modules(SLOTS, stored, {"head": 0.5})["unembed"]
    assert (found.a.shape, found.b.shape, found.bias.shape) == ((4, 2), (2, 9), (9,))
    assert found.scale == 0.5


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_ranks_that_differ_are_padded_and_scales_folded(kind):
    """Into b and a bias; magnitudes are lengths whatever the scale."""
    ranks, scales = {"h.0.up": 3, "h.1.up": 1}, {"h.0.up": 2.0, "h.1.up": 0.25}
    stored = {name: lora(name, rank, ROLES[kind]) for name, rank in ranks.items()}
    module = build.modules(SLOTS, stored, scales)["up"]
    assert type(module) is kind and module.scale == 1.0 and module.a.shape == (2, 4, 3)
    assert not module.a[1, :, 1:].any() and not module.b[1, 1:].any()
    for n, (name, tensors) in enumerate(stored.items()):
        want = scales[name] * (tensors["lora_B"] @ tensors["lora_A"]).T
        np.testing.assert_allclose(module.a[n] @ module.b[n], want, atol=1e-5)
        row = tensors[ROLES[kind]]
        if kind is DoRA:
            np.testing.assert_array_equal(module.magnitude[n], row)
        else:
            np.testing.assert_allclose(module.bias[n], scales[name] * row, rtol=1e-6)


@pytest.mark.parametrize("role", ["", *ROLES.values()])
def test_a_layer_without_a_module_gets_zeros(role):
    stored = {"h.1.down": lora("h.1.down", role=role)}
    module = build.modules(SLOTS, stored, {"h.1.down": 3.0})["down"]
    assert module.scale == 3.0
    arrays = [value for value in vars(module).values() if hasattr(value, "ndim")]
    assert len(arrays) == (3 if role else 2)
    assert all(not array[0].any() and array[1].all() for array in arrays)


@pytest.mark.parametrize(("side", "shape"), [("input", (1, 4)), ("output", (6, 1))])
def test_a_rescaling_is_its_offset_from_one_and_its_shape_tells_its_side(side, shape):
    stored = {"h.1.up": {"ia3_l": draw(*shape)}}
    module = build.modules(SLOTS, stored, {})["up"]
    assert type(module) is IA3 and module.on == side and not module.offset[0].any()
    np.testing.assert_array_equal(module.offset[1], stored["h.1.up"]["ia3_l"].reshape(-1) - 1)


def test_nothing_comes_of_nothing():
    assert build.modules(SLOTS, {}, {}) == {}

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax import mesh, models, table
from lora_jax.table import Leaf


def test_a_layered_weight_has_a_name_and_a_shape_a_layer():
    leaf = Leaf("NDH", (3, 8, 6), "layers.{n}.q.weight", transposed=True)
    assert leaf.names() == ["layers.0.q.weight", "layers.1.q.weight", "layers.2.q.weight"]
    assert leaf.stored_shape() == (6, 8)
    assert Leaf("VD", (9, 8), "embed").names() == ["embed"]
    assert Leaf("VD", (9, 8), "embed").stored_shape() == (9, 8)


def test_a_bias_is_as_wide_as_its_weight():
    kernel = Leaf("NDF", (3, 8, 6), "layers.{n}.fc.weight", transposed=True)
    assert table.biased("layers.fc", kernel) == {
        "layers.fc": kernel,
        "layers.fc.bias": Leaf("NF", (3, 6), "layers.{n}.fc.bias"),
    }
    head, gain = Leaf("DV", (8, 9), "head.weight"), Leaf("D", (8,), "norm.weight", norm=True)
    assert table.biased("unembed", head)["unembed.bias"] == Leaf("V", (9,), "head.bias")
    assert table.biased("norm", gain)["norm.bias"] == Leaf("D", (8,), "norm.bias")


def test_nesting_and_flattening_are_inverse(config):
    flat = dict.fromkeys(models.table(config), 1)
    nested = table.nest(flat)
    assert nested["layers"]["self_attn.q_proj"] == 1
    assert table.flatten(nested) == flat


def test_no_two_weights_share_a_name_and_axes_fit_shapes(config):
    full = replace(config, tied=False, qkv_bias=True, output_bias=True, mlp_bias=True)
    leaves = models.table(full)
    names = [name for leaf in leaves.values() for name in leaf.names()]
    assert len(names) == len(set(names))
    assert all(len(leaf.axes) == len(leaf.shape) for leaf in leaves.values())


def test_random_weights_have_the_tables_shapes_and_keep_the_variance(config):
    leaves = models.table(replace(config, width=256, hidden=128))
    init = jax.jit(lambda key: table.init(key, leaves, jnp.bfloat16))
    weights = table.flatten(init(jax.random.key(0)))
    shapes = table.flatten(table.abstract(leaves, jnp.bfloat16))
    assert {p: (w.shape, w.dtype) for p, w in weights.items()} == {
        p: (s.shape, s.dtype) for p, s in shapes.items()
    }
    assert (weights["norm"] == 1).all()
    deviation = {p: float(w.astype(jnp.float32).std()) for p, w in weights.items()}
    np.testing.assert_allclose(deviation["layers.mlp.down_proj"], 128**-0.5, rtol=0.05)
    np.testing.assert_allclose(deviation["embed"], 256**-0.5, rtol=0.05)


def test_a_real_shape_needs_no_weights(config):
    seven = replace(config, width=4096, hidden=11008, layers=32, heads=32, kv_heads=32,
                    head_width=128, vocabulary=32000, tied=False)  # fmt: skip
    leaves = jax.tree.leaves(table.abstract(models.table(seven)))
    assert sum(leaf.size for leaf in leaves) == 6_738_415_616  # LLaMA-7B


def test_weights_are_cut_along_their_axes_and_never_by_layer(config):
    one = mesh.make_mesh(data=1)
    specs = jax.tree.map(lambda s: s.spec, table.shardings(models.table(config), one))
    layers = specs["layers"]
    assert specs["embed"] == PartitionSpec("tensor", "fsdp")
    assert layers["self_attn.q_proj"] == PartitionSpec(None, "fsdp", "tensor")
    assert layers["mlp.down_proj"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["input_layernorm"] == PartitionSpec(None, None)


def test_an_uneven_cut_is_left_whole(config, run_on_devices):
    printed = run_on_devices(
        """
from lora_jax import mesh, models, table
leaf = {"embed": table.Leaf("VD", (10, 8), "embed"), "layers.q": table.Leaf("NDH", (2, 8, 6), "q")}
placed = table.shardings(leaf, mesh.make_mesh(data=1, fsdp=2, tensor=4))
print(list(placed["embed"].spec), list(placed["layers"]["q"].spec))
"""
    )
    assert printed.strip() == "[None, 'fsdp'] [None, 'fsdp', None]"


def test_a_new_head_is_drawn_by_its_path_and_its_deviation():
    kernel = Leaf("DL", (400, 3), "head.weight", transposed=True, new=0.02)
    (path, _), (bias_path, bias) = table.biased("head", kernel).items()
    one = table.new_weight(path, kernel)
    np.testing.assert_array_equal(one, table.new_weight(path, kernel))
    assert 0.018 < one.std() < 0.022 and one.dtype == np.float32
    assert np.any(one != table.new_weight("other", kernel))
    assert bias_path == "head.bias" and bias.new == 0.02
    np.testing.assert_array_equal(table.new_weight(bias_path, bias), np.zeros(3))


def test_a_modules_own_weight_fits_but_for_the_number_of_labels():
    out = Leaf("DL", (8, 3), "head.weight", transposed=True)
    assert out.fits((3, 8)) and out.fits((5, 8))
    assert not out.fits((3, 9)) and not out.fits((3,)) and not out.fits((8, 3))
    stacked = Leaf("NDF", (2, 8, 6), "h.{n}.weight")
    assert stacked.fits((8, 6)) and not stacked.fits((2, 8, 6))

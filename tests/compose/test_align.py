import jax.numpy as jnp
import numpy as np
import pytest

from compose.align import by_projection, common_rank, common_scale, pad_rank
from lora_jax.errors import InputError
from lora_jax.modules import LoRA, fold_scale

Q, UP = "self_attn.q_proj", "mlp.up_proj"


def test_every_projection_of_any_adapter_is_listed(lora):
    x, y = lora(0, paths=(Q,)), lora(1, paths=(UP, Q))
    table = by_projection([x, {}, y])
    assert list(table) == [Q, UP]
    assert table[Q] == [x[Q], None, y[Q]]
    assert table[UP] == [None, None, y[UP]]


def test_modules_of_two_kinds_do_not_meet(lora, ia3):
    with pytest.raises(InputError, match=r"mlp\.up_proj: cannot combine IA3 .* with LoRA"):
        by_projection([lora(), ia3()])


def test_modules_of_two_models_do_not_meet(lora):
    with pytest.raises(InputError, match=r"2 layers, 7 to 6.* with .*3 layers, 7 to 6"):
        by_projection([lora(layers=2), lora(layers=3)])


def test_the_two_sides_of_ia3_do_not_meet(ia3):
    with pytest.raises(InputError, match=r"on its input.* with .*on its output"):
        by_projection([ia3(on="output"), ia3(on="input")])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_folding_and_padding_change_no_delta(lora, dense, dtype):
    module = lora(dtype=dtype, scale=2.0)[Q]
    want = dense({Q: module})[Q]
    folded, padded = fold_scale(module), pad_rank(module, 5)
    assert folded.scale == 1 and folded.b.dtype == dtype
    assert padded.a.shape[-1] == 5
    np.testing.assert_array_equal(dense({Q: folded})[Q], want)
    np.testing.assert_array_equal(dense({Q: padded})[Q], want)


def test_folding_and_padding_keep_a_bias(lora):
    module = lora(scale=2.0)[Q].replace(bias=jnp.ones((2, 6)))
    assert (fold_scale(module).bias == 2).all()
    assert (pad_rank(module, 5).bias == 1).all()


def test_a_rank_is_never_cut_by_padding(lora):
    with pytest.raises(InputError, match="rank 3 cannot be padded to rank 2"):
        pad_rank(lora()[Q], 2)


def test_equal_scales_are_kept_and_unequal_ones_folded(lora):
    x, y, z = lora(0)[Q], lora(1)[Q], lora(2, scale=0.5)[Q]
    assert common_scale([x, y]) == [x, y]
    assert [module.scale for module in common_scale([x, z])] == [1.0, 1.0]


def test_ragged_ranks_meet_at_the_largest(lora):
    ranks = [m.a.shape[-1] for m in common_rank([lora(rank=1)[Q], lora(rank=4)[Q]])]
    assert ranks == [4, 4]


def test_what_is_no_module_is_a_bug_and_not_bad_input():
    with pytest.raises(TypeError, match="tuple is not a module"):
        by_projection([{Q: (1, 2)}])


def test_a_library_axis_counts_as_layers():
    stacked = LoRA(jnp.zeros((4, 2, 7, 3)), jnp.zeros((4, 2, 3, 6)))
    with pytest.raises(InputError, match="4 x 2 layers"):
        by_projection([{Q: stacked}, {Q: LoRA(stacked.a[0], stacked.b[0])}])

import math

import jax
import jax.numpy as jnp
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import Experts, LoRA, describe, init_ia3, init_lora, resolve_targets

SHAPES = {
    "self_attn.q_proj": (3, 8, 6),
    "self_attn.v_proj": (3, 8, 4),
    "mlp.down_proj": (3, 10, 8),
}


def new(targets=("q_proj",), rank=2, alpha=4.0, seed=0, **options):
    key = jax.random.key(seed)
    return init_lora(key, SHAPES, targets=targets, rank=rank, alpha=alpha, **options)


def test_targets_are_named_whole_or_by_their_last_part_in_table_order():
    assert resolve_targets(["down_proj", "self_attn.q_proj"], SHAPES) == [
        "self_attn.q_proj",
        "mlp.down_proj",
    ]


def test_a_part_of_a_name_is_no_target():
    with pytest.raises(InputError, match="unknown projection 'proj', 'attn'; this model has"):
        resolve_targets(["proj", "attn", "q_proj"], SHAPES)


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_factors_have_a_layer_axis_and_the_rank_asked_for(rank):
    module = new(rank=rank)["self_attn.q_proj"]
    assert module.a.shape == (3, 8, rank)
    assert module.b.shape == (3, rank, 6)


def test_a_is_uniform_within_its_bound_and_b_is_zero():
    module = new(rank=64)["self_attn.q_proj"]
    bound = 1 / math.sqrt(8)
    assert 0.95 * bound < jnp.abs(module.a).max() <= bound
    assert abs(module.a.mean()) < 0.05 * bound
    assert not module.b.any()


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert new(rank=4, alpha=6)["self_attn.q_proj"].scale == 6 / 4
    assert new(rank=4, alpha=6, rslora=True)["self_attn.q_proj"].scale == 6 / 2


def test_modules_that_share_a_seed_share_their_start_whatever_their_other_targets():
    alone, among = new(["v_proj"]), new(["q_proj", "v_proj", "down_proj"])
    assert (alone["self_attn.v_proj"].a == among["self_attn.v_proj"].a).all()


def test_projections_layers_and_seeds_draw_apart():
    one, other = new(["q_proj", "v_proj"]), new(["q_proj"], seed=1)
    q = one["self_attn.q_proj"].a
    assert not (q == one["self_attn.v_proj"].a).any()
    assert not (q == other["self_attn.q_proj"].a).any()
    assert not (q[0] == q[1]).any()


@pytest.mark.parametrize("rank", [0, -2])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(InputError, match=f"rank must be at least 1; got {rank}"):
        new(rank=rank)


def test_ia3_layouts_have_the_sides_and_sizes_of_their_papers(config):
    sizes = models.projections(config)
    peft, pem = (init_ia3(sizes, models.ia3_layouts(config)[name]) for name in ("peft", "pem"))
    assert {p: (m.on, m.offset.shape) for p, m in peft.items()} == {
        "self_attn.k_proj": ("output", (2, 16)),
        "self_attn.v_proj": ("output", (2, 16)),
        "mlp.down_proj": ("input", (2, 64)),
    }
    assert pem["mlp.up_proj"].on == "output"
    assert pem["mlp.up_proj"].offset.shape == (2, 64)


def test_scales_and_sides_are_static_so_that_tree_maps_see_arrays_only(random_lora, config):
    adapter = random_lora(config, alpha=5.0, rank=2)
    leaves = jax.tree.leaves(adapter)
    assert len(leaves) == 2 * len(adapter)
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert all(m.scale == 2.5 for m in doubled.values())


def test_a_module_is_described_in_a_few_words(config, random_ia3):
    lora = new(["q_proj", "v_proj"])
    assert describe(lora) == "LoRA of rank 2 on q_proj, v_proj (156 parameters)"
    assert describe({}) == "the base model (no module)"
    assert describe(random_ia3(config)).startswith("IA3 on k_proj, v_proj, down_proj (")
    both = {"x": LoRA(jnp.zeros((1, 4, 2)), jnp.zeros((1, 2, 4)))}
    both["y"] = Experts(
        jnp.zeros((1, 5, 4, 3)), jnp.zeros((1, 5, 3, 4)), prototypes=jnp.zeros((1, 5, 4))
    )
    assert describe(both).startswith("Experts + LoRA of rank 2, 3 on x, y")

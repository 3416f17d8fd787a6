"""A batch whose rows take their modules out of slots is its rows one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import flax_linen, models, modules
from lora_jax.decoder import embed
from lora_jax.errors import InputError
from lora_jax.module_files import save_modules
from lora_jax.modules import IA3, DoRA, Experts, LoRA, PerExample
from lora_jax.per_example import of_rows, refuse_rows
from lora_jax.project import Dropout, project

SLOTS, ROWS = 4, [2, 0, 2, 3, 1]


def draw(n, *shape):
    return jax.random.normal(jax.random.key(n), shape)


X, KERNEL, BIAS = draw(0, 5, 7, 8), draw(1, 8, 6), draw(2, 6)
PARTS = {
    "lora": LoRA(draw(3, SLOTS, 8, 3), draw(4, SLOTS, 3, 6), 0.5),
    "biased": LoRA(draw(3, SLOTS, 8, 3), draw(4, SLOTS, 3, 6), 0.5, draw(5, SLOTS, 6)),
    "dora": DoRA(
        draw(3, SLOTS, 8, 3), draw(4, SLOTS, 3, 6), 2 + draw(5, SLOTS, 6).clip(-1, 1), 0.5
    ),
    "output": IA3(draw(6, SLOTS, 6)),
    "input": IA3(draw(6, SLOTS, 8), "input"),
    "experts": Experts(
        draw(7, SLOTS, 5, 8, 2), draw(8, SLOTS, 5, 2, 6), draw(9, SLOTS, 5, 8), top_k=2
    ),
    "large": Experts(
        draw(7, SLOTS, 40, 8, 2), draw(8, SLOTS, 40, 2, 6), draw(9, SLOTS, 40, 8), top_k=1
    ),
    "spectrum": Experts(
        draw(7, SLOTS, 5, 8, 2), draw(8, SLOTS, 5, 2, 6), top_k=2, spectrum=draw(9, SLOTS, 5, 2)
    ),
    "given": Experts(draw(7, SLOTS, 5, 8, 2), draw(8, SLOTS, 5, 2, 6), shares=draw(9, SLOTS, 5)),
    "factors": Experts(
        draw(7, SLOTS, 5, 8, 2), draw(8, SLOTS, 5, 2, 6), draw(9, SLOTS, 5, 8), 3, 0.5, "factors"
    ),
}


def one_by_one(x, part, rows=ROWS):
    slots = [jax.tree.map(lambda leaf, n=n: leaf[n], part) for n in range(SLOTS)]
    return jnp.stack([project(row, KERNEL, BIAS, slots[n]) for row, n in zip(x, rows, strict=True)])


@pytest.mark.parametrize("name", PARTS)
def test_each_row_runs_under_the_module_in_its_slot(name):
    found = project(X, KERNEL, BIAS, PerExample((PARTS[name],), jnp.array(ROWS)))
    np.testing.assert_allclose(found, one_by_one(X, PARTS[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 8), (5, 2, 3, 8)])
def test_a_row_may_have_any_axes(size):
    x, part = draw(0, *size), PARTS["input"]
    found = project(x, KERNEL, BIAS, PerExample((part,), jnp.array(ROWS)))
    np.testing.assert_allclose(found, one_by_one(x, part), rtol=1e-5, atol=1e-5)


def test_all_kinds_together_are_each_where_the_others_are_zero():
    """Slot n of part n alone is not zero, so row by row one kind acts."""
    kinds = ["lora", "dora", "input", "experts"]
    parts = [
        jax.tree.map(lambda x, n=n: jnp.zeros_like(x).at[n].set(x[n]), PARTS[kind])
        for n, kind in enumerate(kinds)
    ]
    found = project(X, KERNEL, BIAS, PerExample(tuple(parts), jnp.array(ROWS)))
    for row, slot in enumerate(ROWS):
        own = jax.tree.map(lambda x, n=slot: x[n], PARTS[kinds[slot]])
        want = project(X[row], KERNEL, BIAS, own)
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", [SLOTS, -1])
def test_a_row_of_a_slot_that_does_not_exist_is_nan_and_the_others_are_not(slot):
    rows = jnp.array(ROWS).at[1].set(slot)
    found = project(X, KERNEL, None, PerExample((PARTS["lora"],), rows))
    assert np.isnan(found).all(axis=(1, 2)).tolist() == [False, True, False, False, False]
    assert np.isfinite(np.delete(found, 1, axis=0)).all()


def test_a_gradient_reaches_the_slots_in_use_and_is_the_sum_over_their_rows():
    def loss(part, apply):
        return jnp.sum(apply(part) ** 2)

    rows = [2, 0, 2, 0, 0]

    def together(part):
        return project(X, KERNEL, BIAS, PerExample((part,), jnp.array(rows)))

    found = jax.grad(loss)(PARTS["lora"], together)
    want = jax.grad(loss)(PARTS["lora"], lambda part: one_by_one(X, part, rows))
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-3), found, want)
    assert not found.a[1].any() and found.a[2].any()


def test_dropout_differs_by_row_and_falls_on_the_module_path_only():
    same = PerExample((PARTS["lora"],), jnp.zeros(5, jnp.int32))
    x = jnp.broadcast_to(X[:1], X.shape)
    drop = Dropout(jax.random.key(1), 0.5)
    found = project(x, jnp.zeros_like(KERNEL), None, same, drop)
    assert not np.allclose(found[0], found[1])
    apart = project(x, KERNEL, BIAS, same, drop) - (x @ KERNEL + BIAS)
    np.testing.assert_allclose(apart, found, atol=1e-5)


def test_embeddings_differ_by_row():
    kernel, tokens = draw(0, 11, 6), jnp.array([[1, 2, 10], [3, 3, 0]])
    part = LoRA(draw(1, SLOTS, 11, 2), draw(2, SLOTS, 2, 6), 1.5)
    found = embed(kernel, tokens, PerExample((part,), jnp.array([3, 1])))
    for row, slot in enumerate([3, 1]):
        own = LoRA(part.a[slot], part.b[slot], part.scale)
        np.testing.assert_allclose(found[row], embed(kernel, tokens[row], own), rtol=1e-5)
    with pytest.raises(InputError, match="can differ by row; this is IA3"):
        embed(kernel, tokens, PerExample((IA3(draw(1, SLOTS, 6)),), jnp.array([3, 1])))


def test_rows_are_chosen_and_counted(config, weights):
    rows = jnp.broadcast_to(jnp.array(ROWS), (2, 5))
    module = PerExample((LoRA(draw(0, 2, SLOTS, 32, 2), draw(1, 2, SLOTS, 2, 32)),), rows)
    whole = {"self_attn.q_proj": module, "self_attn.o_proj": LoRA(draw(2, 2, 32, 1), BIAS)}
    some = of_rows(whole, [4, 0])
    assert some["self_attn.q_proj"].rows.tolist() == [[1, 2], [1, 2]]
    assert some["self_attn.o_proj"] is whole["self_attn.o_proj"]
    refuse_rows(some, 2)
    tokens = jnp.zeros((3, 4), jnp.int32)
    with pytest.raises(InputError, match=r"self_attn\.q_proj: .* for 5 rows, and the batch has 3"):
        models.forward(config, weights, whole, tokens)


def test_what_has_no_rows_refuses_by_name(config, weights, tmp_path):
    module = PerExample((LoRA(draw(0, SLOTS, 32, 2), draw(1, SLOTS, 2, 264)),), jnp.zeros(2, int))
    with pytest.raises(InputError, match="unembedding is one for all rows; leave lm_head out"):
        models.unembed(config, weights, {"unembed": module}, draw(0, 2, 32))
    with pytest.raises(InputError, match="unembed: a batch's slots; save their adapters"):
        save_modules(tmp_path / "new", {"unembed": module})
    with pytest.raises(InputError, match="PerExample cannot be merged"):
        models.changed_by("unembed", module, KERNEL)
    assert "PerExample on unembed" in modules.describe({"unembed": module})


def test_a_flax_models_rows_differ_too():
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(6)])
    variables = model.init(jax.random.key(0), X)
    module = PerExample((PARTS["lora"], PARTS["input"]), jnp.array(ROWS))
    found = flax_linen.apply(model, variables, {"layers_0": module}, X)
    own = variables["params"]["layers_0"]
    np.testing.assert_allclose(found, project(X, own["kernel"], own["bias"], module), rtol=1e-5)
    narrow = jax.tree.map(lambda x: x[..., :5], PARTS["input"])
    with pytest.raises(InputError, match="layers_0 is"):
        flax_linen.apply(model, variables, {"layers_0": module.replace(parts=(narrow,))}, X)

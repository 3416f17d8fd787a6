"""Rows of one batch under different adapters, and adapters swapped while the program stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.arrow import route_library
from compose.library import Library
from compose.slots import assigned, clear, for_rows, make_slots, put
from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.modules import DoRA, LoRA, Saved

ROWS, TIME, Q = 6, 7, "self_attn.q_proj"


def relative(found, want) -> float:
    found, want = (np.asarray(x, np.float64) for x in (found, want))
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def adapters(config, random_lora, random_ia3):
    """The base, LoRA of several ranks, scales and targets, IA3, DoRA, and routed libraries."""
    small, large = (
        random_lora(config, 1),
        random_lora(config, 2, rank=5, targets=("q_proj", "up_proj")),
    )
    members = tuple(random_lora(config, seed, rank=2) for seed in (3, 4, 5))
    library = Library(("a", "b", "c"), members)
    biased = {p: m.replace(bias=0.1 + jnp.zeros(m.b.shape[::2])) for p, m in small.items()}
    dora = {p: DoRA(m.a, m.b, 1 + jnp.zeros(m.b.shape[::2]), m.scale) for p, m in large.items()}
    return {
        "base": {},
        "small": small,
        "large": large,
        "ia3": random_ia3(config),
        "biased": biased,
        "dora": dora,
        "routed": route_library(library, top_k=2),
        "factors": route_library(library, top_k=1, mixing="factors"),
    }


@pytest.fixture(scope="module")
def forward(config, weights):
    return jax.jit(lambda adapter, tokens: models.forward(config, weights, adapter, tokens).hidden)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=ROWS, max_size=ROWS), st.integers(0, 9))
def test_a_mixed_batch_is_its_rows_one_by_one(adapters, forward, random_tokens, rows, seed):
    tokens, every = random_tokens(ROWS, TIME, seed=seed), list(adapters.values())
    found = forward(for_rows(every, rows), tokens)
    for row, which in enumerate(rows):
        alone = forward(every[which], tokens[row : row + 1])[0]
        assert relative(found[row], alone) < 1e-6


def lora_slots(config, random_lora, count=3, rank=4):
    return make_slots([random_lora(config, 0, rank=rank)], count)


def test_adapters_are_swapped_and_nothing_compiles_again(
    config, forward, random_lora, random_tokens, caplog
):
    """Of any rank, scale and targets that fit, from the host or a device."""
    tokens = random_tokens(ROWS, TIME)
    new = [
        random_lora(config, 7, rank=1),
        random_lora(config, 8, rank=4, alpha=1.0),
        random_lora(config, 9, rank=3, targets=("v_proj",), rslora=True),
        jax.tree.map(np.asarray, random_lora(config, 6, rank=2)),
    ]
    alone = [forward(adapter, tokens) for adapter in [{}, *new]]
    slots = put(lora_slots(config, random_lora), 1, new[0])
    forward(assigned(slots, [0, 1, 2, 0, 1, 2]), tokens).block_until_ready()
    with jax.log_compiles():
        for swap, adapter in enumerate(new[1:], 2):
            slots = clear(put(slots, swap % 3, adapter), (swap + 1) % 3)
            rows = [swap % 3, (swap + 1) % 3] * 3
            found = np.asarray(forward(assigned(slots, rows), tokens))
            for row, n in enumerate([swap, 0] * 3):
                assert relative(found[row], alone[n][row]) < 1e-6
        assert not [r.message for r in caplog.records if "Compiling" in r.message]
        put(lora_slots(config, random_lora, rank=6), 0, new[0])
        assert [r.message for r in caplog.records if "Compiling jit(_written)" in r.message]


def test_slots_hold_every_kind(config, adapters, forward, random_tokens):
    tokens, every = random_tokens(ROWS, TIME), list(adapters.values())
    slots = make_slots(every, len(every))
    for slot, adapter in enumerate(every):
        slots = put(slots, slot, adapter)
    rows = [6, 7, 5, 4, 3, 0]
    found, want = (forward(f, tokens) for f in (assigned(slots, rows), for_rows(every, rows)))
    assert relative(found, want) < 1e-7


def test_putting_uses_the_old_slots_up(config, random_lora):
    old = lora_slots(config, random_lora)
    before = old.parts[Q][0].a
    new = put(old, 0, random_lora(config, 1))
    assert before.is_deleted() and not new.parts[Q][0].a.is_deleted()


def test_slots_keep_small_types_and_refuse_what_they_would_round(config, random_lora):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_lora(config, 1))
    wide, narrow = make_slots([half, random_lora(config)], 2), make_slots([half], 2)
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    held = put(wide, 1, half).parts[Q][0]
    assert held.a.dtype == jnp.float32
    np.testing.assert_array_equal(held.a[:, 1], half[Q].a.astype(jnp.float32))
    with pytest.raises(InputError, match=r"q_proj: a, b would be rounded to the slots' type"):
        put(narrow, 0, random_lora(config))


def test_rows_and_adapters_may_be_traced(config, weights, random_lora, random_tokens, forward):
    tokens = random_tokens(2, TIME)
    x, y = random_lora(config, 1), random_lora(config, 2, rank=5)

    @jax.jit
    def loss(adapters, rows):
        adapter = for_rows(adapters, rows)
        return jnp.sum(models.forward(config, weights, adapter, tokens).hidden[..., 0] ** 2)

    def alone(adapters):
        states = [forward(m, tokens[n : n + 1]) for n, m in enumerate(adapters)]
        return sum(jnp.sum(x[..., 0] ** 2) for x in states)

    found, want = jax.grad(loss)([x, y], jnp.array([0, 1])), jax.grad(alone)([x, y])
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), found, want)
    both = jax.vmap(loss, (None, 0))([x, y], jnp.array([[0, 1], [1, 1]]))
    np.testing.assert_allclose(both, [loss([x, y], [0, 1]), loss([x, y], [1, 1])], rtol=1e-5)


MESH = """
import jax, numpy as np
from compose.slots import assigned, for_rows, make_slots, put
from lora_jax import mesh, models, modules, table
from lora_jax.families import llama
from lora_jax.rope import Rope
c = llama.Config(kind="llama", vocabulary=264, width=32, hidden=64, layers=2, heads=4,
                  kv_heads=2, head_width=8, context=128, rope=Rope(8), tied=True)
w = table.init(jax.random.key(0), models.table(c))
def new(seed):
    key, shapes = jax.random.key(seed), models.projections(c)
    m = modules.init_lora(key, shapes, targets=["q_proj", "down_proj"], rank=2, alpha=4)
    return jax.tree.map(lambda x: x + 0.1 * seed, m)
adapters, rows = [{}, new(1), new(2)], [0, 1, 2, 2, 1, 0, 1, 1]
x = np.asarray(jax.random.randint(jax.random.key(2), (8, 6), 0, 256))
run = jax.jit(lambda a, w, x: models.forward(c, w, a, x).hidden)
one = run(for_rows(adapters, rows), w, x)
for sizes in [(8, 1, 1), (2, 2, 2)]:
    m = mesh.make_mesh(*sizes)
    placed = jax.device_put(w, table.shardings(models.table(c), m))
    slots = jax.device_put(make_slots(adapters, 3), mesh.replicated(m))
    for n, adapter in enumerate(adapters):
        slots = put(slots, n, adapter)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(slots))
    many = run(assigned(slots, rows), placed, mesh.put_batch(x, m))
    assert len(many.devices()) == 8 and many.addressable_shards[0].data.shape[0] < 8
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=2e-5)
    print("same", *sizes)
"""


def test_eight_devices_share_the_rows(run_on_devices):
    assert run_on_devices(MESH).count("same") == 2


def test_what_does_not_fit_is_refused_by_name(config, random_lora, random_ia3, adapters):
    slots = lora_slots(config, random_lora)
    lora, given = random_lora(config)[Q], adapters["routed"][Q]
    for adapter, words in (
        (random_lora(config, rank=5), r"slot 1: self_attn\.q_proj: rank 5; .* up to 4; self_attn"),
        (random_lora(config, targets=("k_proj",)), r"k_proj: the slots have self_attn\.q_proj, "),
        (random_ia3(config), r"mlp\.down_proj: the slots are for LoRA; this is IA3 on input"),
        (adapters["routed"], "for LoRA; this is Experts of 3 by prototypes top_k 2 temperature 1"),
        (adapters["biased"], r"q_proj: the slots have no bias"),
        ({Q: lora.replace(a=lora.a[:1])}, r"LoRA \(a \(1, 32, 3\), .* have LoRA \(a \(2, 32, 4\)"),
        ({Q: given.replace(shares=jnp.ones((2, 6, 3)))}, "shares are by example; give each row"),
        ({Q: Saved(jnp.zeros((2, 32, 32)))}, "q_proj: a Saved module cannot differ by row"),
        (for_rows([{Q: lora}], [0]), "q_proj: a PerExample module cannot differ by row"),
    ):
        with pytest.raises(InputError, match=words):
            put(slots, 1, adapter)
    put(slots, 1, {})  # what was refused has not used the slots up


def test_bad_rows_slots_and_mixtures_are_refused(config, random_lora):
    x, lora = random_lora(config), random_lora(config)[Q]
    slots = lora_slots(config, random_lora)
    with pytest.raises(InputError, match=r"no slot 3, -1: there are 3, counted from 0"):
        assigned(slots, [0, 3, -1])
    with pytest.raises(InputError, match="no slot 3"):
        clear(slots, 3)
    with pytest.raises(InputError, match="no slot 1: there are 1"):
        for_rows([x], jnp.array([0, 1]))
    with pytest.raises(InputError, match="at least 1; got 0 and 1"):
        make_slots([x], 0)
    with pytest.raises(InputError, match=r"lm: a Saved module .*; self_attn\.q_proj: LoRA \(a \(1"):
        for_rows([x, {"lm": Saved(lora.a), Q: LoRA(lora.a[:1], lora.b[:1])}], [0])


def test_slots_are_as_wide_as_asked(config, random_lora):
    slots = make_slots([random_lora(config, rank=2)], 2, rank=9)
    assert put(slots, 0, random_lora(config, rank=9)).parts[Q][0].a.shape == (2, 2, 32, 9)

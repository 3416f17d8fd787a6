"""Gates: the formula of the paper, trained alone, to the same bits from the same seed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import models
from lora_jax.errors import InputError
from lora_jax.project import project
from train.batches import assemble, batches_from
from train.data import plan_data
from train.gates import first_gates, gated, make_step, train_gates

Q = "self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(base, random_lora):
    return random_lora(base.config, 1, targets=("q_proj", "v_proj"), rank=3, alpha=6.0, size=0.1)


@pytest.fixture(scope="module")
def plan(config_of, base):
    return plan_data(config_of(), base, None)[0]


def test_a_gated_module_is_multiplied_by_the_sigmoid_of_its_gate(adapter):
    gates = {
        path: jax.random.normal(jax.random.key(1), m.a.shape[:-1]) for path, m in adapter.items()
    }
    x, zero = jax.random.normal(jax.random.key(0), (2, 5, 32)), jnp.zeros((32, 32))
    module, free, gate = jax.tree.map(
        lambda leaf: leaf[1], (gated(adapter, gates)[Q], adapter[Q], gates[Q])
    )
    found, plain = (project(x, zero, module=m) for m in (module, free))
    want = plain / (1 + np.exp(-(np.asarray(x, np.float64) @ np.asarray(gate))))[..., None]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_first_gates_let_half_through(base, adapter):
    half = {path: m.replace(scale=m.scale / 2) for path, m in adapter.items()}
    tokens = jnp.arange(6)[None]
    forward = jax.jit(lambda a: models.forward(base.config, base.weights, a, tokens).hidden)
    found = forward(gated(adapter, first_gates(adapter)))
    np.testing.assert_allclose(found, forward(half), rtol=1e-4, atol=1e-4)


def test_a_step_moves_every_gate_and_nothing_else(base, adapter, plan):
    optimizer = optax.sgd(1.0)
    gates = first_gates(adapter)
    step = jax.jit(make_step(base.config, adapter, optimizer))
    batch = assemble(plan, next(batches_from(plan, 0, 0)))
    moved, _, loss = step(base.weights, gates, optimizer.init(gates), batch)
    assert moved.keys() == gates.keys() and np.isfinite(loss)
    for path, row in moved.items():
        assert (np.abs(row).max(-1) > 0).all() and row.shape == adapter[path].a.shape[:-1]


def test_training_lowers_the_loss_to_the_same_bits(base, adapter, plan):
    options = {"steps": 6, "learning_rate": 0.1}
    arguments = (base.config, base.weights, adapter, plan)
    gates, losses = train_gates(*arguments, **options)
    again, _ = train_gates(*arguments, **options)
    assert losses.shape == (6,) and losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, again, gates)


def test_what_has_no_gates_is_refused(base, plan, adapter, random_ia3):
    with pytest.raises(InputError, match=r"gates are of LoRA modules: .* holds IA3"):
        first_gates(random_ia3(base.config))
    with pytest.raises(InputError, match="no module to gate"):
        first_gates({})
    broken = {path: m.replace(b=m.b * np.nan) for path, m in adapter.items()}
    with pytest.raises(InputError, match="step 1 of the gates gave loss nan; lower learning_rate"):
        train_gates(base.config, base.weights, broken, plan, steps=1)

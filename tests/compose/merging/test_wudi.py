import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compose.merging.wudi import wudi, wudi_adam
from lora_jax.modules import LoRA

WEIGHTS = jnp.array([0.7, -1.3, 2.0])
merged = jax.jit(wudi, static_argnames="damping")
walked = jax.jit(wudi_adam, static_argnames=["steps", "rate"])


def tasks(deltas, weights):
    return np.asarray(weights, np.float64)[:, None, None] * deltas


def objective(tau, taus, damping=0.0):
    """The paper's, on matrices (I, O)."""
    interference = sum(np.sum(((tau - t).T @ t) ** 2) / np.sum(t**2) for t in taus)
    return interference + damping * np.sum((tau - sum(taus)) ** 2)


def minimum(taus, damping=0.0):
    """By the normal equations of the whole input space, from the sum of the task vectors."""
    grams = [t @ t.T / np.sum(t**2) for t in taus]
    system = sum(grams) + damping * np.eye(len(taus[0]))
    rest = sum(g @ t for g, t in zip(grams, taus, strict=True)) + damping * sum(taus)
    inverse = np.linalg.pinv(system, rcond=1e-12)
    return inverse @ rest + (np.eye(len(system)) - inverse @ system) @ sum(taus)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("rows", [11, 5])  # inputs for all six ranks, and fewer
def test_it_is_the_minimum_of_the_papers_objective(members, deltas, far, damping, rows):
    m = members(rows=rows)
    taus = tasks(deltas(m), WEIGHTS)
    found = deltas(merged(m, WEIGHTS, damping=damping))
    assert far(found, minimum(taus, damping)) < 1e-5
    least = objective(found, taus, damping)
    for seed in range(3):
        step = 1e-3 * np.random.default_rng(seed).standard_normal(found.shape)
        assert objective(found + step, taus, damping) > least


def test_independent_modules_keep_all_that_they_do_on_their_own_inputs(members, deltas, far):
    m = members()
    taus = tasks(deltas(m), WEIGHTS)
    found = deltas(merged(m, WEIGHTS))
    assert all(far(tau.T @ found, tau.T @ tau) < 1e-5 for tau in taus)
    assert far(sum(taus), taus[0]) > 0.5


def test_descent_on_the_dense_objective_from_the_sum_ends_there(members, deltas, far):
    m = members(rows=5)
    taus = tasks(deltas(m), WEIGHTS)
    grams = [t @ t.T / np.sum(t**2) for t in taus]
    tau = sum(taus)
    for _ in range(3000):
        tau = tau - 0.3 * sum(g @ (tau - t) for g, t in zip(grams, taus, strict=True))
    assert far(deltas(merged(m, WEIGHTS)), tau) < 1e-5


def test_modules_that_share_their_inputs_are_averaged_there(members, deltas, far):
    m = members(count=2)
    same = m.replace(a=jnp.broadcast_to(m.a[:1], m.a.shape), b=jnp.stack([m.b[0], 3 * m.b[0]]))
    assert far(deltas(merged(same, jnp.ones(2))), 2 * deltas(m)[0]) < 1e-5


def test_damping_goes_from_the_minimum_to_the_sum(members, deltas, far):
    m = members()
    found = deltas(merged(m, WEIGHTS, damping=1e6))
    assert far(found, tasks(deltas(m), WEIGHTS).sum(0)) < 1e-5


def adam(taus, steps, rate):
    """Kingma and Ba's Adam on the objective's gradient, from the sum."""
    tau, first, second = sum(taus), 0.0, 0.0
    for n in range(1, steps + 1):
        gradient = 2 * sum(t @ t.T @ (tau - t) / np.sum(t**2) for t in taus)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, spread = first / (1 - 0.9**n), second / (1 - 0.999**n)
        tau = tau - rate * mean / (np.sqrt(spread) + 1e-8)
    return tau


def test_adam_is_the_papers_walk(members, deltas, far):
    m = members()
    taus = tasks(deltas(m), WEIGHTS)
    assert far(walked(m, WEIGHTS, steps=50, rate=1e-2), adam(taus, 50, 1e-2)) < 1e-5
    assert far(walked(m, WEIGHTS), sum(taus)) < 1e-3  # the defaults are small steps


@pytest.mark.parametrize("shape", [(3, 5, 2), (3, 2, 7)])
def test_adam_takes_factors_as_it_takes_deltas(far, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    found = walked(jnp.asarray(x, jnp.float32), WEIGHTS, steps=50, rate=1e-2)
    assert far(found, adam(tasks(x, WEIGHTS), 50, 1e-2)) < 1e-5


def test_adam_averages_vectors_and_leaves_one_module_alone(members, deltas, far):
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_allclose(walked(x, WEIGHTS), np.mean(WEIGHTS[:, None] * x, axis=0), rtol=1e-6)
    one = members(count=1)
    assert far(walked(one, jnp.ones(1), steps=50, rate=1.0), deltas(one)[0]) < 1e-6


def test_a_module_that_does_nothing_asks_for_nothing(members, deltas, far):
    m = members()
    grown = LoRA(*(jnp.concatenate([x, jnp.zeros_like(x[:1])]) for x in (m.a, m.b)), m.scale)
    weights = jnp.append(WEIGHTS, 5.0)
    assert far(deltas(merged(grown, weights)), deltas(merged(m, WEIGHTS))) < 1e-5

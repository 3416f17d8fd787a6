import jax.numpy as jnp
import numpy as np
import optax

from train.subject import MODULE, bounded


def test_by_default_what_is_frozen_and_trained_is_a_pass_as_it_is():
    frozen, trained = {"embed": jnp.ones(2)}, {"q": jnp.ones(3)}
    weights, adapter = MODULE.applied(frozen, trained)
    assert weights is frozen and adapter is trained
    assert MODULE.penalty(trained) == 0 and MODULE.bound is None


def test_steps_end_within_the_bound():
    move = bounded(1.0)
    params = {"w": jnp.array([0.9, -0.9, 0.0, 1.4])}
    updates, _ = move.update({"w": jnp.array([0.5, -0.5, 0.3, 0.0])}, move.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], [1, -1, 0.3, 1])

"""Several adapters learn in one batch, each from its own rows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compose.slots import for_rows
from train.loss import Batch, batch_loss


def test_each_adapters_gradient_is_that_of_its_rows_alone(
    config, weights, random_lora, random_tokens
):
    tokens = random_tokens(3, 6)
    places = jnp.broadcast_to(jnp.arange(5), (3, 5))
    batch = Batch(
        tokens,
        jnp.ones_like(tokens),
        jnp.broadcast_to(jnp.arange(6), (3, 6)),
        places,
        tokens[:, 1:],
        jnp.ones((3, 5)),
    )
    adapters, rows = [random_lora(config, 1), random_lora(config, 2)], np.array([1, 0, 1])
    loss = partial(batch_loss, config, weights)
    together = jax.value_and_grad(lambda x: loss(for_rows(x, rows), batch, remat=True))
    alone = jax.jit(jax.value_and_grad(loss))
    found, gradients = jax.jit(together)(adapters)
    parts = [replace(batch, weights=batch.weights * (rows == n)[:, None]) for n in range(2)]
    expected = [alone(m, part) for m, part in zip(adapters, parts, strict=True)]
    np.testing.assert_allclose(found, sum(value for value, _ in expected), rtol=1e-6)
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5),
        gradients,
        [gradient for _, gradient in expected],
    )

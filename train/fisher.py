"""The diagonal of a module's Fisher information, which `compose.merging` weighs entries by."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.modules import Adapter


def diagonal(loss: Callable[[Adapter, Any], jax.Array], adapter: Adapter, examples: Any) -> Adapter:
    """The mean over `examples` of the squared gradient of a loss, in the form of the module.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging" (2111.09832), equation 3,
    with the data's own labels (the empirical Fisher information). `loss` is one example's negative
    log-likelihood in nats, and `examples` a pytree whose leaves have the examples in front; one
    gradient exists at a time.
    """

    def added(total: Adapter, example: Any) -> tuple[Adapter, None]:
        """The sum of squares with one example's."""
        gradient = jax.grad(loss)(adapter, example)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) ** 2, total, gradient), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), adapter)
    total, _ = jax.lax.scan(added, start, examples)
    count = len(jax.tree.leaves(examples)[0])
    return jax.tree.map(lambda x: x / count, total)

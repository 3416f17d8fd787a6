import jax
import jax.numpy as jnp
import numpy as np

from compose.merging.merge import merge
from lora_jax import models
from lora_jax.losses import cross_entropy
from train.fisher import diagonal


def test_it_is_the_mean_of_squared_gradients_and_weighs_a_merge(
    config, weights, random_lora, random_tokens
):
    adapter, rows = random_lora(config), random_tokens(3, 8)

    def loss(adapter, row):
        hidden = models.forward(config, weights, adapter, row[None, :-1]).hidden
        logits = models.unembed(config, weights, adapter, hidden)[0]
        return jnp.sum(cross_entropy(logits, row[1:])[0])

    found = jax.jit(lambda a: diagonal(loss, a, rows))(adapter)
    gradients = [jax.jit(jax.grad(loss))(adapter, row) for row in rows]
    wanted = jax.tree.map(lambda *gs: sum(g**2 for g in gs) / 3, *gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), found, wanted)
    other = random_lora(config, 1)
    nothing = jax.tree.map(jnp.zeros_like, found)
    merged, _ = merge([adapter, other], "fisher", space="factor", fishers=[found, nothing])
    path = next(iter(adapter))
    known = np.asarray(found[path].b > 0)
    mine = adapter[path].scale * np.einsum("NIR,NRO->NIO", adapter[path].a, adapter[path].b)
    its = np.einsum("NIR,NRO->NIO", merged[path].a, merged[path].b)
    assert known.all() and np.abs(its - mine).max() < 1e-4 * np.abs(mine).max()

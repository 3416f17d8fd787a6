"""Small random modules of one projection or two, and what they add to a kernel, written out."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.modules import IA3, Adapter, LoRA

SIZES = {"self_attn.q_proj": (7, 6), "mlp.up_proj": (5, 9)}


@pytest.fixture(scope="session")
def lora():
    """A function to a LoRA adapter on every projection of `SIZES`."""

    def make(seed=0, *, rank=3, scale=2.0, layers=2, dtype=jnp.float32, paths=tuple(SIZES)):
        random = np.random.default_rng([seed, rank, layers])

        def draw(*shape):
            return jnp.asarray(random.standard_normal((layers, *shape)), dtype)

        drawn = {p: (draw(i, rank), draw(rank, o)) for p, (i, o) in SIZES.items()}
        return {path: LoRA(*drawn[path], scale) for path in paths}

    return make


@pytest.fixture(scope="session")
def ia3():
    """A function to an IA3 adapter on `mlp.up_proj`."""

    def make(seed=0, *, layers=2, dtype=jnp.float32, on="output"):
        offset = np.random.default_rng(seed).standard_normal((layers, 9))
        return {"mlp.up_proj": IA3(jnp.asarray(offset, dtype), on)}

    return make


@pytest.fixture(scope="session")
def dense():
    """A function to what an adapter adds, in float64: deltas (N, I, O) and offsets by path."""

    def add(adapter: Adapter) -> dict[str, np.ndarray]:
        return {path: _dense(module) for path, module in adapter.items()}

    def _dense(module):
        if isinstance(module, IA3):
            return np.asarray(module.offset, np.float64)
        a, b = (np.asarray(x, np.float64) for x in (module.a, module.b))
        return module.scale * np.einsum("...IR,...RO->...IO", a, b)

    return add

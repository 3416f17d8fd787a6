"""Random modules of one projection at one layer, and how far a result is from a reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.modules import LoRA


@pytest.fixture(scope="session")
def members():
    """A function to `count` modules as one LoRA with an axis M in front of a and b."""

    def make(seed=0, *, count=3, rank=2, scale=-1.5, rows=11, width=9):
        random = np.random.default_rng([seed, count, rank])
        a = random.standard_normal((count, rows, rank))
        b = random.standard_normal((count, rank, width))
        return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale)

    return make


@pytest.fixture(scope="session")
def ragged(members):
    """The same modules, the first of rank 1 only and padded with zeros."""
    m = members()
    real = jnp.ones((3, 2)).at[0, 1].set(0)
    return m.replace(a=m.a * real[:, None], b=m.b * real[:, :, None])


@pytest.fixture(scope="session")
def deltas():
    """A function to the dense deltas of a LoRA, in float64."""

    def of(module: LoRA) -> np.ndarray:
        a, b = (np.asarray(x, np.float64) for x in (module.a, module.b))
        return module.scale * a @ b

    return of


@pytest.fixture(scope="session")
def far():
    """A function to the relative distance of a result from the wanted one."""

    def apart(found, wanted) -> float:
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    return apart

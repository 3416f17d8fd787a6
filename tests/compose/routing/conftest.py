import jax
import pytest

from compose.library import Library

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="session")
def members(config, random_lora):
    """Five modules of unequal ranks and scales on the attention of the tiny model."""
    ranks = (3, 2, 4, 3, 2)
    return tuple(
        random_lora(config, seed, targets=TARGETS, rank=rank, alpha=6.0)
        for seed, rank in enumerate(ranks)
    )


@pytest.fixture(scope="session")
def library(config, members):
    """The five by name, each with gates and with mean activations."""

    def vectors(seed):
        """Random vectors for every module."""
        key = jax.random.key(seed)
        draws = ((adapter, jax.random.fold_in(key, n)) for n, adapter in enumerate(members))
        return tuple(
            {path: jax.random.normal(draw, m.a.shape[:-1]) for path, m in adapter.items()}
            for adapter, draw in draws
        )

    kinds = {"gates": vectors(1), "activations": vectors(7)}
    return Library(tuple("vwxyz"), members, vectors=kinds)

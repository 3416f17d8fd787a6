"""Batches whose rows run under modules of their own: what a row takes out of the slots."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA, Module, PerExample

Array = jax.Array


def own(module: PerExample) -> tuple[Module, ...]:
    """The modules of each row, a row axis in front of every leaf: (B, the module's own axes)."""
    return jax.tree.map(lambda leaf: _taken(leaf, module.rows), module.parts)


def _taken(leaf: Array, index: Array | tuple[Array, Array]) -> Array:
    """The places of a leaf at an index; NaN where there is none."""
    return leaf.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def looked_up(module: PerExample, tokens: Array) -> Array:
    """What each row's own LoRA of the embedding adds (B, T, D) to those of its tokens (B, T)."""
    added = []
    for part in module.parts:
        if not isinstance(part, LoRA):
            name = type(part).__name__
            raise InputError(f"embed: only LoRA of the embedding can differ by row; this is {name}")
        a = _taken(part.a, (module.rows[:, None], tokens))
        added.append(part.scale * a @ _taken(part.b, module.rows))
    return sum(added[1:], added[0])


def of_rows(adapter: Adapter, rows: Sequence[int]) -> Adapter:
    """The adapter for a batch of these rows of the batch that it is for; one for all stays."""
    index = np.asarray(rows, np.int32)
    return {
        path: replace(m, rows=m.rows[..., index]) if isinstance(m, PerExample) else m
        for path, m in adapter.items()
    }


def refuse_rows(adapter: Adapter, count: int) -> None:
    """Refuses an adapter that is for a batch of other than `count` rows."""
    for path, module in adapter.items():
        if isinstance(module, PerExample) and module.rows.shape[-1] != count:
            raise InputError(
                f"{path}: its modules are for {module.rows.shape[-1]} rows, and the batch has "
                f"{count}; assign a slot to each row"
            )

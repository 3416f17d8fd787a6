"""Several modules measured in one run: those that stack share one compiled program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compose.library import stack
from eval.devices import Run
from lora_jax.modules import Adapter, Saved
from lora_jax.progress import bar

Batches = Sequence[tuple[np.ndarray, Any]]  # the items' indices, and the batch that holds them


@dataclass(frozen=True)
class Stack:
    """Columns whose modules lie along one axis M in front of every leaf."""

    columns: tuple[int, ...]
    adapters: Adapter


def stacks(adapters: Sequence[Adapter]) -> list[Stack]:
    """The modules in as few stacks as their kinds allow.

    All LoRA modules make one, all IA3 modules one, and routed modules of equal structure one; the
    base model joins LoRA or IA3 as zeros.
    """
    kinds: dict[Any, list[int]] = {}
    for column, adapter in enumerate(adapters):
        kinds.setdefault(_kind(adapter), []).append(column)
    host = next((kind for kind in ("LoRA", "IA3") if kind in kinds), "base")
    if host != "base":
        kinds[host] += kinds.pop("base", [])
    return [
        Stack(tuple(columns), _stacked(kind, [adapters[n] for n in columns]))
        for kind, columns in kinds.items()
    ]


def _kind(adapter: Adapter) -> Any:
    """What decides whether modules stack; routed or mixed ones must agree in their structure.

    Those that keep the same weights whole stack; none is copied for the sake of another column.
    """
    whole = {path for path, module in adapter.items() if isinstance(module, Saved)}
    names = {type(module).__name__ for path, module in adapter.items() if path not in whole}
    if names in (set(), {"LoRA"}, {"IA3"}):
        return " ".join([*names, *sorted(whole)]) or "base"
    leaves, structure = jax.tree.flatten(dict(adapter))
    return structure, tuple(leaf.shape for leaf in leaves)


def _stacked(kind: Any, adapters: list[Adapter]) -> Adapter:
    """Modules of one kind along a new axis in front."""
    if isinstance(kind, str):
        return stack(adapters)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(dict, adapters))


def measure(
    run: Run, groups: Sequence[Stack], batches: Batches, name: str
) -> list[list[np.ndarray]]:
    """For each column, in order, the result of each item, in order.

    Every batch of every stack is dispatched before the first result is fetched.
    """
    work = [(group, indices, batch) for group in groups for indices, batch in batches]
    out: list[Any] = []
    done = 0
    with bar(name) as progress:
        task = progress.add_task("batches", total=len(work), note="")
        for group, _, batch in work:
            out.append(run(group.adapters, batch, len(group.columns)))
            while done < len(out) and out[done].is_ready():
                done += 1
            progress.update(task, completed=done)
        for n, values in enumerate(out):
            values.block_until_ready()
            progress.update(task, completed=n + 1)
    return _in_order(work, jax.device_get(out))


def _in_order(work: Sequence[tuple], out: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Results by column and item, without those of the rows that filled batches up."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for (group, indices, _), values in zip(work, out, strict=True):
        for column, results in zip(group.columns, values, strict=True):
            found.setdefault(column, {}).update(zip(indices.tolist(), results, strict=False))
    return [[found[column][n] for n in sorted(found[column])] for column in sorted(found)]

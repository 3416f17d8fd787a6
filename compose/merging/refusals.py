"""What cannot be merged, told before anything is."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter
from typing import Any

import jax
import numpy as np

from compose.align import by_projection
from compose.arithmetic import refuse_sum
from compose.merging.della import beyond
from compose.merging.methods import (
    ELEMENTWISE,
    INNER,
    LOW_RANK,
    METHODS,
    SUMS,
    VECTOR,
    options_of,
)
from compose.option_values import faults
from compose.weights import Weights, refuse_lost
from lora_jax.errors import InputError, nearest, refuse_all
from lora_jax.modules import IA3, Adapter, Module, Saved

_SOURCES = {"fishers": ", which lora-train --fisher measures"}


def refuse_unfit(
    adapters: Sequence[Adapter],
    method: str,
    weights: Weights,
    space: str,
    rank: int | None,
    options: Mapping[str, Any],
) -> None:
    """Refuses a merge that makes no sense, in words."""
    refuse_method(method, options)
    if not adapters:
        raise InputError("a merge of no modules is undefined; give at least one")
    if len(adapters) != len(weights):
        raise InputError(f"{len(adapters)} modules need as many weights; got {len(weights)}")
    known = [w for w in jax.tree.leaves(list(weights)) if not isinstance(w, jax.core.Tracer)]
    endless = [w for w in known if not np.isfinite(w).all()]
    if endless:
        raise InputError(f"a weight is {endless[0]}; weights are finite numbers")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1; got {rank}")
    held = [module for adapter in adapters for module in adapter.values()]
    if rank is not None and held and all(isinstance(module, IA3) for module in held):
        raise InputError("IA3 has no rank to bring down: drop the rank")
    _refuse_space(method, space, rank)
    table = by_projection(adapters)
    refuse_lost(weights, table)
    refuse_all(list(_misfits(table, method)), f"merging by {method}")
    if "fishers" in options:
        _refuse_fishers(adapters, options["fishers"])


def refuse_method(method: str, options: Mapping[str, Any]) -> None:
    """Refuses a method that there is not, and options that it has not or lacks."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {nearest(method, METHODS)}")
    inner = options.get("inner")
    if told := unknown_inner(inner):
        raise InputError(told)
    known = options_of(method, inner)
    has = f"it has {', '.join(known)}" if known else "it has none"
    wrong = [f"{method} has no option {name!r}; {has}" for name in options if name not in known]
    wrong += [
        f"{method} needs {name}{_SOURCES.get(name, '')}"
        for name, option in known.items()
        if option.default is Parameter.empty and name not in options
    ]
    given = {name: value for name, value in options.items() if name in known}
    words = [n for n, v in given.items() if isinstance(v, str) and known[n].annotation is not str]
    wrong += [f"{name} is a number; got {given.pop(name)!r}" for name in words]
    wrong += faults(given)
    if not wrong and "epsilon" in known:
        density, epsilon = (given.get(n, known[n].default) for n in ("density", "epsilon"))
        told = beyond(density, epsilon / 2 if "della" in (method, inner) else epsilon)
        wrong += [told] if told else []
    refuse_all(wrong, "merging")


def unknown_inner(inner: Any) -> str:
    """Why an option `inner` names no method that merges coordinates; "" if it does, or is none."""
    if inner is None or inner in INNER:
        return ""
    if inner == "fisher":
        return f"fisher knows entries, not coordinates; choose as inner {', '.join(INNER)}"
    return f"unknown inner method {inner!r}; {nearest(str(inner), INNER)}"


def _refuse_space(method: str, space: str, rank: int | None) -> None:
    """Refuses a space that there is not, or that the method or a rank does not go with."""
    if space not in ("delta", "factor"):
        raise InputError(f"unknown space {space!r}; choose delta or factor")
    if space == "factor":
        if rank is not None:
            raise InputError(
                "a rank recompresses deltas; factor space keeps its ranks: drop the rank"
            )
        if method in ("cat", "svd") or (method in LOW_RANK and method not in ELEMENTWISE):
            raise InputError(f"{method} works on deltas; merge in delta space")


def _misfits(table: Mapping[str, list[Module | None]], method: str) -> Iterable[str]:
    """What a method cannot merge, by projection."""
    unfit = []
    for path, modules in table.items():
        for module in (m for m in modules if m is not None):
            refuse_sum(path, module)
            if isinstance(module, Saved) and method not in SUMS:
                yield f"{path} is kept whole, and only weighted sums ({', '.join(SUMS)}) merge that"
                break
            if isinstance(module, IA3) and method not in (*SUMS, *VECTOR):
                unfit.append(path)
                break
    if unfit:
        have = ", ".join(dict.fromkeys([*SUMS, *VECTOR]))
        yield f"{', '.join(unfit)}: IA3, which {method} has no form for; these have: {have}"


def _refuse_fishers(adapters: Sequence[Adapter], fishers: Sequence[Adapter]) -> None:
    """Refuses Fisher information that is not each module's own."""
    if len(adapters) != len(fishers):
        raise InputError(f"{len(adapters)} modules need as many fishers; got {len(fishers)}")
    for number, (adapter, fisher) in enumerate(zip(adapters, fishers, strict=True)):
        if missing := sorted(adapter.keys() - fisher.keys()):
            raise InputError(f"fishers[{number}] lacks {', '.join(missing)}, which its module has")
        by_projection([adapter, {path: fisher[path] for path in adapter}])

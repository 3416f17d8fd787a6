"""What cannot be merged, told before anything is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter
from typing import Any

import jax

from compose.align import by_projection
from compose.arithmetic import refuse_sum
from compose.merging.methods import ELEMENTWISE, LOW_RANK, METHODS, SUMS, VECTOR, options_of
from compose.weights import Weights, refuse_lost
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import IA3, Adapter, Module, Saved

# The least and the largest of options that are numbers, as far as they have any.
_BOUNDS = {
    "damping": (0, math.inf),
    "beta": (0, 1),
    "rate": (0, math.inf),
    "tolerance": (0, math.inf),
}


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
    plain = [] if isinstance(weights, jax.Array) else weights
    endless = [w for w in plain if isinstance(w, float) and not math.isfinite(w)]
    if endless:
        raise InputError(f"a weight is {endless[0]}; weights are finite numbers")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1; got {rank}")
    _refuse_space(method, space, rank)
    table = by_projection(adapters)
    refuse_lost(weights, table)
    refuse_all(list(_misfits(table, method)), f"merging by {method}")
    if "fishers" in options:
        _refuse_fishers(adapters, options["fishers"])


def refuse_method(method: str, options: Mapping[str, Any]) -> None:
    """Refuses a method that there is not, and options that it has not or lacks."""
    if method not in METHODS:
        close = get_close_matches(method, METHODS, 1)
        remedy = f"did you mean {close[0]}?" if close else f"choose {', '.join(METHODS)}"
        raise InputError(f"unknown method {method!r}; {remedy}")
    inner = options.get("inner")
    if inner is not None and inner not in ELEMENTWISE:
        raise InputError(f"unknown inner method {inner!r}; choose {', '.join(ELEMENTWISE)}")
    known = options_of(method, inner)
    has = f"it has {', '.join(known)}" if known else "it has none"
    wrong = [f"{method} has no option {name!r}; {has}" for name in options if name not in known]
    wrong += [
        f"{method} needs {name}"
        for name, option in known.items()
        if option.default is Parameter.empty and name not in options
    ]
    given = {name: value for name, value in options.items() if name in known}
    wrong += [p for name, value in given.items() for p in _beyond(known[name], value)]
    refuse_all(wrong, "merging")


def _beyond(option: Parameter, value: Any) -> Iterable[str]:
    """What is wrong with an option's value, where it is a plain number or should be one."""
    name = option.name
    if isinstance(value, str) and option.annotation is not str:
        yield f"{name} is a number; got {value!r}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    least, most = _BOUNDS.get(name, (-math.inf, math.inf))
    if not math.isfinite(value):
        yield f"{name} must be finite; got {value}"
    elif not least <= value <= most:
        upper = f" and at most {most:g}" if most < math.inf else ""
        yield f"{name} must be at least {least:g}{upper}; got {value:g}"


def _refuse_space(method: str, space: str, rank: int | None) -> None:
    """Refuses a space that there is not, or that the method or a rank does not go with."""
    if space not in ("delta", "factor"):
        raise InputError(f"unknown space {space!r}; choose delta or factor")
    if space == "factor":
        if rank is not None:
            raise InputError("a rank recompresses deltas; factor space keeps its ranks")
        if method in ("cat", "svd") or (method in LOW_RANK and method not in ELEMENTWISE):
            raise InputError(f"{method} works on deltas; merge in delta space")


def _misfits(table: Mapping[str, list[Module | None]], method: str) -> Iterable[str]:
    """What a method cannot merge, by projection."""
    for path, modules in table.items():
        for module in (m for m in modules if m is not None):
            refuse_sum(path, module)
            if isinstance(module, Saved) and method not in SUMS:
                yield f"{path} is kept whole, and only weighted sums ({', '.join(SUMS)}) merge that"
                break
            if isinstance(module, IA3) and method not in (*SUMS, *VECTOR):
                yield f"{path} holds IA3, which {method} has no form for"
                break


def _refuse_fishers(adapters: Sequence[Adapter], fishers: Sequence[Adapter]) -> None:
    """Refuses Fisher information that is not each module's own."""
    if len(adapters) != len(fishers):
        raise InputError(f"{len(adapters)} modules need as many fishers; got {len(fishers)}")
    for number, (adapter, fisher) in enumerate(zip(adapters, fishers, strict=True)):
        if missing := sorted(adapter.keys() - fisher.keys()):
            raise InputError(f"fishers[{number}] lacks {', '.join(missing)}, which its module has")
        by_projection([adapter, {path: fisher[path] for path in adapter}])

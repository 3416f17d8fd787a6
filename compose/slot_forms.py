"""What shapes slots have for adapters, which adapters fit them, and adapters brought to them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import refuse_all
from lora_jax.modules import IA3, Adapter, DoRA, Experts, LoRA, Module

Part = LoRA | DoRA | IA3 | Experts
Forms = Mapping[str, tuple[Part, ...]]  # one of each kind; leaves are `jax.ShapeDtypeStruct`s

_RANK = {"a": -1, "b": -2, "spectrum": -1}  # where a tensor has the rank
_SCALED = ("b", "bias")  # what a scale is folded into


def lead(module: Any) -> int:
    """How many axes a module's leaves have in front of its own."""
    if isinstance(module, IA3):
        return module.offset.ndim - 1
    return module.a.ndim - (3 if isinstance(module, Experts) else 2)


def forms(adapters: Sequence[Adapter], rank: int = 1) -> Forms:
    """The shapes that hold any of the adapters, of `rank` or the largest rank among them.

    Refuses what no row can have to itself, and modules of two base models.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    problems = []
    for path, module in (pair for adapter in adapters for pair in adapter.items()):
        if told := _common(path, module):
            problems.append(told)
            continue
        alike = found.setdefault(path, {}).setdefault(kind(module), [])
        if alike and _sizes(alike[0]) != _sizes(module):
            problems.append(f"{path}: {_shapes(module)} beside {_shapes(alike[0])}")
        alike.append(module)
    refuse_all(problems, "these adapters cannot share a batch")
    return {
        path: tuple(_form(alike, rank) for alike in kinds.values()) for path, kinds in found.items()
    }


def kind(module: Any) -> str:
    """What modules of one part have in common, in words: all but ranks, scales and sizes."""
    told: dict[str, Any] = {}
    if isinstance(module, Experts):
        by = sorted(_arrays(module).keys() - {"a", "b"})
        told = {"of": module.a.shape[-3], "by": " and ".join(by)}
    for field in fields(module):
        if not field.metadata.get("pytree_node", True) and field.name != "scale":
            told[field.name] = getattr(module, field.name)
    return " ".join([type(module).__name__, *(f"{name} {value}" for name, value in told.items())])


def refuse_misfits(held: Forms, adapter: Adapter, where: str) -> None:
    """Refuses an adapter that has no place in slots of these forms, naming all that is amiss."""
    problems = []
    for path, module in adapter.items():
        if path not in held:
            problems.append(f"{path}: the slots have {', '.join(held)}")
        elif told := _common(path, module):
            problems.append(told)
        else:
            problems += _amiss(path, {kind(form): form for form in held[path]}, module)
    refuse_all(problems, where)


def _amiss(path: str, held: Mapping[str, Any], module: Any) -> list[str]:
    """What keeps a module out of the forms that a projection has, by kind."""
    if (form := held.get(kind(module))) is None:
        return [f"{path}: the slots are for {' and '.join(held)}; this is {kind(module)}"]
    problems = []
    if _sizes(form) != _sizes(module):
        problems.append(f"{path}: {_shapes(module)} where the slots have {_shapes(form)}")
    elif (rank := _rank(module)) > (most := _rank(form)):
        problems.append(f"{path}: rank {rank}; the slots are for up to {most}")
    if rounded := [n for n, x in _arrays(form).items() if _rounds(getattr(module, n), x.dtype)]:
        problems.append(f"{path}: {', '.join(rounded)} would be rounded to the slots' type")
    if lost := _arrays(module).keys() - _arrays(form).keys():
        problems.append(f"{path}: the slots have no {', '.join(lost)}")
    return problems


def filled(held: Forms, adapter: Adapter) -> dict[str, tuple[Any, ...]]:
    """The adapter in these forms: scales folded in, zeros where it has nothing."""
    return {path: tuple(_in(form, adapter.get(path)) for form in held[path]) for path in held}


def _in(form: Any, module: Any) -> Any:
    """A module in a form of its kind; the identity if it is of another, or missing."""
    if module is None or kind(module) != kind(form):
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), form)
    scale = getattr(module, "scale", 1.0)
    grown = {
        name: _grown(getattr(module, name), want, scale if name in _SCALED else 1.0)
        for name, want in _arrays(form).items()
    }
    return form.replace(**grown)


def _grown(x: Any, want: jax.ShapeDtypeStruct, scale: float) -> Any:
    """x times a scale, with zeros after it up to a shape.

    On the host unless x is traced: there a shape that was never seen costs no compilation.
    """
    if x is None:
        return np.zeros(want.shape, want.dtype)
    space: Any = jnp if isinstance(x, jax.core.Tracer) else np
    x = space.asarray(x)
    more = [(0, size - had) for size, had in zip(want.shape, x.shape, strict=True)]
    return space.pad((scale * x).astype(want.dtype), more)


def _form(alike: Sequence[Any], rank: int) -> Any:
    """The shapes that hold each of the modules, all of one kind and size."""
    rank = max(rank, *map(_rank, alike))
    arrays: dict[str, Any] = {}
    for name, x in (pair for module in alike for pair in _arrays(module).items()):
        shape, known = list(x.shape), arrays.get(name, x).dtype
        if name in _RANK:
            shape[_RANK[name]] = rank
        arrays[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.promote_types(x.dtype, known))
    scale = {"scale": 1.0} if hasattr(alike[0], "scale") else {}
    return alike[0].replace(**arrays, **scale)


def _arrays(module: Any) -> dict[str, Any]:
    """A module's tensors by name."""
    held = {field.name: getattr(module, field.name) for field in fields(module)}
    return {name: x for name, x in held.items() if hasattr(x, "shape")}


def _rank(module: Any) -> int:
    return 1 if isinstance(module, IA3) else module.a.shape[-1]


def _sizes(module: Any) -> dict[str, tuple[int, ...]]:
    """A module's shapes without their ranks, and without a bias, which it may lack."""
    shapes = {name: list(x.shape) for name, x in _arrays(module).items() if name != "bias"}
    for name in shapes.keys() & _RANK.keys():
        del shapes[name][_RANK[name]]
    return {name: tuple(shape) for name, shape in shapes.items()}


def _shapes(module: Any) -> str:
    """A module's kind and shapes in words."""
    told = ", ".join(f"{name} {tuple(x.shape)}" for name, x in _arrays(module).items())
    return f"{kind(module)} ({told})"


def _rounds(x: Any, dtype: Any) -> bool:
    """Whether a tensor loses digits in a type."""
    return x is not None and jnp.promote_types(x.dtype, dtype) != dtype


def _common(path: str, module: Module) -> str | None:
    """Why a module is of all rows at once and has no place in a slot, in words; None if it has."""
    if not isinstance(module, Part):
        name = type(module).__name__
        return f"{path}: a {name} module cannot differ by row; merge it or leave it"
    shares = module.shares if isinstance(module, Experts) else None
    if shares is not None and shares.ndim > lead(module) + 1:
        return f"{path}: its shares are by example; give each row's adapter its own"
    return None

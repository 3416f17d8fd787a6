"""What one step of a recipe makes of its parts: a pure function of modules and libraries."""

from collections.abc import Mapping
from typing import Any

from compose import arithmetic
from compose.arithmetic import Space
from compose.expression import resolve_with_losses
from compose.functions import FUNCTIONS, Value
from compose.geometry import recompress_members
from compose.library import Library, join
from compose.merging.functions import information
from compose.merging.merge import merge
from compose.provenance import Errors
from compose.recipe.methods import METHODS
from compose.recipe.shares import mixing, refuse_idle
from compose.recipe.value import FISHERS, Expression, Method, Step


def made(step: Step, parts: Mapping[str, Value], space: Space) -> tuple[Value, Errors]:
    """The module or library that a step makes, and what it lost to a rank, by a library's member.

    `parts` are what it uses by name; `space` is the one of steps that name none.
    """
    space = step.space or space
    if isinstance(step, Method) and step.name not in FUNCTIONS:
        return _merged(step, parts, space)
    lost: Errors = {}
    if isinstance(step, Expression):
        value, lost = resolve_with_losses(step.text, parts, space=space)
    elif step.weights is not None:
        members, weights = _weighed(step, parts)
        value = arithmetic.average(members.adapters, weights, space=space)
    else:
        value = _function(step, parts, space)
    if step.rank is None:
        return value, lost
    value, errors = recompress_members(value, step.rank)
    return value, {**lost, **errors}


def _function(step: Method, parts: Mapping[str, Value], space: Space) -> Value:
    """A function of expressions applied; one of any number of modules takes them as libraries."""
    members: list[Any] = [parts[name] for name in step.members]
    if METHODS[step.name].most is None:
        members = [_library(name, parts[name]) for name in step.members]
    return FUNCTIONS[step.name](*members, **step.options, space=space)


def _library(name: str, value: Value) -> Library:
    """A library as it is, or a module as a library of one."""
    return value if isinstance(value, Library) else Library((name,), (value,))


def _weighed(step: Method, parts: Mapping[str, Value]) -> tuple[Library, list[Any]]:
    """A method's modules, libraries' members one by one, and their weights."""
    libraries = [_library(name, parts[name]) for name in step.members]
    members = join(libraries)
    shares = step.weights or (1.0,) * len(libraries)
    refuse_idle(shares, members.adapters)
    every = {path: module for adapter in members.adapters for path, module in adapter.items()}
    counts = [len(library.adapters) for library in libraries]
    weights = [mixing(share, every) for share in shares]
    return members, [w for w, n in zip(weights, counts, strict=True) for _ in range(n)]


def _merged(step: Method, parts: Mapping[str, Value], space: Space) -> tuple[Value, Errors]:
    """A method of merging applied."""
    members, weights = _weighed(step, parts)
    options = dict(step.options)
    if FISHERS in options:
        options[FISHERS] = information([parts[name] for name in options[FISHERS]], space)
    result, errors = merge(
        members.adapters, step.name, weights=weights, space=space, rank=step.rank, **options
    )
    return result, {"": errors}

"""The merging methods as functions that an expression may call: ties(a, b, density=0.3)."""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, getdoc
from typing import Any, get_args

import jax
import jax.numpy as jnp

from compose.arithmetic import Space
from compose.library import Library, join
from compose.merging.elementwise import ELEMENTWISE
from compose.merging.merge import Errors, merge
from compose.merging.methods import METHODS, draws, function_of, options_of
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA

Merging = Callable[..., tuple[Adapter, Errors]]
List = tuple[float, ...] | None
Modules = tuple[Adapter | Library, ...]
WORDS = (float, int, str, bool)  # what an expression can write


def _options(method: str) -> dict[str, Parameter]:
    """A method's options as an expression gives them: where a number may be traced, a number."""
    found = options_of(method)
    if "inner" in found:
        found = {n: p for name in ELEMENTWISE for n, p in options_of(name).items()} | found
        found.pop("fishers")
    plain = {n: [kind for kind in WORDS if kind in _kinds(p)] for n, p in found.items()}
    return {
        name: option.replace(
            annotation=_optional(plain[name][0], option.default) if plain[name] else Modules
        )
        for name, option in found.items()
    }


def _kinds(option: Parameter) -> tuple[Any, ...]:
    return get_args(option.annotation) or (option.annotation,)


def _optional(kind: type, default: Any) -> Any:
    return kind | None if default is None else kind


def _function(method: str) -> Merging:
    """A method as a function of libraries, whose signature says all that it takes."""

    def joined(*modules: Library, space: Space, **options: Any) -> tuple[Adapter, Errors]:
        """The modules merged, and what bringing them down to a rank lost."""
        if "fishers" in options:
            options["fishers"] = information(options["fishers"], space)
        return merge(join(modules).adapters, method, space=space, **options)

    merged: Any = joined
    more: dict[str, tuple[Any, Any]] = {"weights": (List, None), "rank": (int | None, None)}
    if draws(method) or "inner" in options_of(method):
        more["seed"] = (int, 0)
    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in more.items()
    ]
    shown = [
        Parameter("modules", Parameter.VAR_POSITIONAL, annotation=Library),
        *_options(method).values(),
        *keywords,
        Parameter("space", Parameter.KEYWORD_ONLY, annotation=Space),
    ]
    told = {"name": method, "doc": getdoc(function_of(method)), "signature": Signature(shown)}
    for name, value in told.items():
        setattr(merged, f"__{name}__", value)
    return merged


def information(given: Sequence[Adapter | Library], space: Space) -> list[Adapter]:
    """Fisher information as `lora-train --fisher` writes it: of every factor, for factor space."""
    parts = [value.adapters if isinstance(value, Library) else (value,) for value in given]
    adapters = [adapter for part in parts for adapter in part]
    every = [(n, *item) for n, adapter in enumerate(adapters) for item in adapter.items()]
    for number, path, module in every:
        if isinstance(module, LoRA) and space != "factor":
            raise InputError(
                f"{path}: Fisher information of factors weighs factors; add --space factor, or "
                f"space: factor to a recipe's step"
            )
        leaves = [x for x in jax.tree.leaves(module) if not isinstance(x, jax.core.Tracer)]
        if any(bool(jnp.any(x < 0)) for x in leaves):
            raise InputError(
                f"fishers[{number}] has negative entries at {path}: it is a module, not Fisher "
                f"information; measure that by lora-train --fisher --start-from MODULE"
            )
    return adapters


MERGING: dict[str, Merging] = {method: _function(method) for method in METHODS}

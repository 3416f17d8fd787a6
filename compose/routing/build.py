"""A library to one adapter that routes every token, at each projection, over its modules."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compose.library import Library, Routing, Vectors, stack
from compose.routing.directions import Factors, own_prototypes, shared_prototypes, spectral
from compose.routing.settings import ROOT, refuse_other_kinds, refuse_routing
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import Adapter, Experts, fold_scale

Array = jax.Array


def route(library: Library, routing: Routing) -> dict[str, Experts]:
    """One adapter that routes each token over the library's modules; leaves are (N, M, ...)."""
    refuse_other_kinds(library)
    refuse_routing(routing, len(library.names))
    vectors = library.vectors.get(routing.router, ())
    if routing.router in ("gates", "activations"):
        _refuse_lost(library, vectors, routing.router)
    return experts(library.adapters, routing, vectors)


def applied(value: Adapter | Library) -> Adapter:
    """The adapter that a forward pass takes: itself, or a library routed as its settings say."""
    if not isinstance(value, Library):
        return value
    if value.routing is None:
        raise InputError(
            f"a library of {len(value.names)} modules is not one module; write arrow() or mean()"
        )
    return route(value, value.routing)


def _refuse_lost(library: Library, vectors: Sequence[Vectors], router: str) -> None:
    """Refuses a library that lacks a vector where a member has a module."""
    given = vectors or [{}] * len(library.names)
    lost = [
        f"{name} has none at {', '.join(missing)}"
        for name, adapter, held in zip(library.names, library.adapters, given, strict=True)
        if (missing := [path for path in adapter if path not in held])
    ]
    maker = {"gates": "train.gates.train_gates", "activations": "compose.routing.probe"}[router]
    refuse_all(lost, f"routing by {router} needs a vector for each module ({maker} makes them)")


def experts(
    adapters: Sequence[Adapter], routing: Routing, vectors: Sequence[Vectors] = ()
) -> dict[str, Experts]:
    """The routed experts of some modules by projection, with what each router compares tokens to.

    `vectors` are the modules' own, for the routers that are given theirs.
    """
    return _BUILDERS[routing.router](factors(adapters), routing, vectors)


def factors(adapters: Sequence[Adapter]) -> Factors:
    """The modules' factors by projection: a (..., M, I, R), and b (..., M, R, O) with its scale."""

    def one(module: Any) -> tuple[Array, Array]:
        a, b = (jnp.moveaxis(x, 0, -3) for x in (module.a, fold_scale(module).b))
        return a, b

    return {path: one(module) for path, module in stack(adapters).items()}


def _arrow(table: Factors, routing: Routing, _: Sequence[Vectors]) -> dict[str, Experts]:
    """Arrow (2405.11157, section 3.2): the direction that each delta amplifies most.

    Where the factors may be rotated it is the first column of each `a`, and so x·a has what a token
    scores already: the prototypes' own product is a fifth of what rank 4 takes of x.
    """
    if routing.prototypes == "shared":
        return _compared(table, routing, shared_prototypes(table), score="absolute")
    if routing.mixing == "factors" or routing.inputs in ("centred", "standard"):
        return _compared(table, routing, own_prototypes(table), score="absolute")
    turned = {path: spectral(a, b) for path, (a, b) in table.items()}
    rows = {path: u[..., 0] for path, (u, _, _) in turned.items()}
    factors = {path: (u, rest) for path, (u, _, rest) in turned.items()}
    found = _compared(factors, routing, rows, score="absolute")
    return {path: replace(held, leading=True) for path, held in found.items()}


def _spectr(table: Factors, routing: Routing, _: Sequence[Vectors]) -> dict[str, Experts]:
    """SpectR (2504.03454): the whole spectrum of each delta, or its directions alone, as coded."""
    found = {}
    for path, (a, b) in table.items():
        u, s, rest = spectral(a, b)
        s = s if routing.router == "spectr" else (s > 0).astype(s.dtype)
        found[path] = Experts(u, rest, spectrum=s, **_settings(routing, a))
    return found


def _gates(table: Factors, routing: Routing, vectors: Sequence[Vectors]) -> dict[str, Experts]:
    """PHATGOOSE (2402.05859, section 3.2): trained gates, standardised as the tokens are."""
    return _compared(table, routing, _rows(table, vectors, _standardised), score="signed")


def _activations(
    table: Factors, routing: Routing, vectors: Sequence[Vectors]
) -> dict[str, Experts]:
    """The mean input of each module on its own data, as MTTL's average-activation selector."""
    return _compared(table, routing, _rows(table, vectors, lambda row: row), score="signed")


def _uniform(table: Factors, routing: Routing, _: Sequence[Vectors]) -> dict[str, Experts]:
    """Every module at 1/M; `weighting` says that nobody gave these shares."""
    count = next(iter(table.values()))[0].shape[-3] if table else 0
    even = given(table, jnp.full((count,), 1 / max(count, 1)), routing.mixing, count)
    return {path: replace(held, weighting="uniform") for path, held in even.items()}


_BUILDERS: dict[str, Callable[[Factors, Routing, Sequence[Vectors]], dict[str, Experts]]] = {
    "arrow": _arrow,
    "spectr": _spectr,
    "spectr-code": _spectr,
    "gates": _gates,
    "activations": _activations,
    "uniform": _uniform,
}


def given(table: Factors, weights: Array, mixing: str, top_k: int) -> dict[str, Experts]:
    """Experts with the same weights (M,) or (B, M) at every projection, `top_k` of them not 0."""

    def one(a: Array, b: Array) -> Experts:
        shares = jnp.broadcast_to(weights, (*a.shape[:-3], *weights.shape))
        return Experts(a, b, top_k=top_k, mixing=mixing, shares=shares)

    return {path: one(*pair) for path, pair in table.items()}


def _compared(
    table: Factors, routing: Routing, rows: Mapping[str, Array], score: str
) -> dict[str, Experts]:
    """Experts that compare tokens with `rows` (..., M, I).

    To centre a token is to centre what it meets, so that is done here, once.
    """
    found = {}
    for path, (a, b) in table.items():
        row = rows[path]
        if routing.inputs in ("centred", "standard"):
            row = row - jnp.mean(row, axis=-1, keepdims=True)
        inputs = "raw" if routing.inputs == "centred" else routing.inputs
        settings = _settings(routing, a)
        found[path] = Experts(a, b, row, score=score, inputs=inputs, **settings)
    return found


def _settings(routing: Routing, a: Array) -> dict[str, Any]:
    """The plain settings of a projection's experts, whose inputs are as wide as `a` (..., I, R)."""
    root = routing.temperature == ROOT
    return {
        "top_k": routing.top_k,
        "temperature": math.sqrt(a.shape[-2]) if root else float(routing.temperature),
        "mixing": routing.mixing,
        "weighting": routing.weighting,
    }


def _rows(
    table: Factors, vectors: Sequence[Vectors], made: Callable[[Array], Array]
) -> dict[str, Array]:
    """The modules' vectors (N, M, I) by projection; zeros where a module has none."""

    def one(path: str, a: Array) -> Array:
        zero = jnp.zeros((*a.shape[:-3], a.shape[-2]), a.dtype)
        return jnp.stack([made(jnp.asarray(held.get(path, zero))) for held in vectors], axis=-2)

    return {path: one(path, a) for path, (a, _) in table.items()}


def _standardised(row: Array) -> Array:
    """A vector with mean 0 and deviation 1 over its features; one that has none stays zero."""
    spread = jnp.std(row, axis=-1, keepdims=True)
    return (row - jnp.mean(row, axis=-1, keepdims=True)) / jnp.where(spread > 0, spread, 1)

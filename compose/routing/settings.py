"""What a library may be routed by, and the refusal of what cannot be."""

import sys
from dataclasses import replace

from compose.library import Library, Routing
from compose.option_values import ROOT, faults
from lora_jax.errors import InputError, refuse_all
from lora_jax.modules import LoRA, Module

# Each paper's settings, where they are not Arrow's: those of `Routing`.
SPECTR = Routing(top_k=4, mixing="factors", router="spectr", weighting="uniform")
GATES = Routing(top_k=2, temperature=ROOT, router="gates", inputs="standard")
ACTIVATIONS = Routing(top_k=sys.maxsize, temperature=ROOT, router="activations")
UNIFORM = Routing(top_k=1, router="uniform")
USUAL = {
    "arrow": Routing(),
    "spectr": SPECTR,
    "spectr-code": replace(SPECTR, router="spectr-code"),
    "gates": GATES,
    "activations": ACTIVATIONS,
    "uniform": UNIFORM,
}
ROUTERS = tuple(USUAL)


def refuse_routing(routing: Routing, count: int) -> None:
    """Refuses settings by which `count` modules cannot be routed, naming every one."""
    problems = faults({n: v for n, v in vars(routing).items() if n not in ("router", "top_k")})
    if routing.router not in ROUTERS:
        problems.append(f"unknown router {routing.router!r}; choose {' or '.join(ROUTERS)}")
    if not 1 <= routing.top_k <= count:
        problems.append(
            f"top_k must lie between 1 and the library's {count} modules; got {routing.top_k}"
        )
    if routing.prototypes == "shared" and routing.router != "arrow":
        problems.append(f"prototypes are shared by arrow alone; {routing.router} takes own")
    if routing.inputs != "raw" and routing.router in ("spectr", "spectr-code", "uniform"):
        problems.append(f"{routing.router} takes raw inputs; got {routing.inputs!r}")
    refuse_all(problems, "routing")


def routing_for(library: Library, usual: Routing, top_k: int | None) -> Routing:
    """The settings for a library of LoRA modules, checked.

    Unless `top_k` is given it is the usual one, or all of fewer modules.
    """
    refuse_other_kinds(library)
    count = len(library.names)
    routing = replace(usual, top_k=min(usual.top_k, count) if top_k is None else top_k)
    refuse_routing(routing, count)
    return routing


def refuse_other_kinds(library: Library) -> None:
    """Refuses a library that holds what cannot be routed, naming what it is and where."""
    held = [(path, _kind(m)) for adapter in library.adapters for path, m in adapter.items()]
    if other := [path for path, kind in held if kind != "LoRA"]:
        kinds = " and ".join(sorted({kind for _, kind in held}))
        raise InputError(f"{other[0]}: Arrow routes LoRA modules; this library holds {kinds}")
    if any(path == "embed" for path, _ in held):
        raise InputError("the embedding cannot be routed; leave embed_tokens out of the library")


def _kind(module: Module) -> str:
    biased = isinstance(module, LoRA) and module.bias is not None
    return type(module).__name__ + " with a lora_bias" * biased


def told(routing: Routing) -> str:
    """Settings in words: "Arrow: top 3, temperature 1, mixing outputs", and what is not usual."""
    heat = routing.temperature
    heat = heat if isinstance(heat, str) else f"{heat:g}"
    usual, names = Routing(), ("inputs", "prototypes", "weighting")
    other = {name: getattr(routing, name) for name in names}
    rest = [f"{name} {value}" for name, value in other.items() if value != getattr(usual, name)]
    router = "Arrow" if routing.router == "arrow" else routing.router
    parts = [f"top {routing.top_k}", f"temperature {heat}", f"mixing {routing.mixing}", *rest]
    return f"{router}: {', '.join(parts)}"

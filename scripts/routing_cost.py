"""What one routed projection costs by the size of its library, in time and in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_jax import selected
from lora_jax.modules import Experts
from lora_jax.routing import all_experts, chosen_experts, route
from scripts.benchmark_routing import Settings
from scripts.timing import alternate, show

Way = Callable[[jax.Array, Experts], jax.Array]


@dataclass(frozen=True)
class Cost:
    """What one way to route costs a token."""

    seconds: float
    bytes: float


def report(settings: Settings) -> None:
    """Prints a table for each size of projection, and draws all of them if a figure is wanted."""
    found = {}
    for size in settings.sizes:
        costs = {count: _costs(settings, size, count) for count in settings.experts}
        found[size] = costs
        _show(settings, size, costs)
    if settings.figure is not None:
        draw(settings.figure, found, settings)


def random_experts(
    key: jax.Array, count: int, size: tuple[int, int], settings: Settings
) -> Experts:
    """Random experts with random unit prototypes."""
    keys = jax.random.split(key, 3)
    a = jax.random.normal(keys[0], (count, size[0], settings.rank)) / size[0] ** 0.5
    b = jax.random.normal(keys[1], (count, settings.rank, size[1])) * 0.01
    rows = jax.random.normal(keys[2], (count, size[0]))
    return Experts(a, b, rows / jnp.linalg.norm(rows, axis=-1, keepdims=True), settings.top_k)


def sorted_ragged(x: jax.Array, experts: Experts) -> jax.Array:
    """The chosen experts alone: tokens (T, I) sorted by expert, a grouped product for a and b."""
    count, top_k = experts.a.shape[0], experts.top_k
    assert experts.prototypes is not None
    weights, index = jax.lax.top_k(route(x, experts.prototypes, top_k), top_k)
    order = jnp.argsort(index.reshape(-1))
    groups = jnp.bincount(index.reshape(-1), length=count)
    inner = jax.lax.ragged_dot(x[order // top_k], experts.a, groups)
    out = jax.lax.ragged_dot(inner * weights.reshape(-1)[order, None], experts.b, groups)
    return jnp.zeros((len(x), out.shape[-1]), x.dtype).at[order // top_k].add(out)


def _costs(settings: Settings, size: tuple[int, int], count: int) -> dict[str, Cost]:
    """What each way costs a token, the plain projection among them."""
    keys = jax.random.split(jax.random.key(count), 3)
    x = jax.random.normal(keys[0], (settings.tokens, size[0]))
    experts = random_experts(keys[1], count, size, settings)
    kernel = jax.random.normal(keys[2], size) / size[0] ** 0.5
    ways: dict[str, Way] = {"all": all_experts, "chosen": chosen_experts}
    if count <= settings.ragged:
        ways["ragged"] = sorted_ragged
    programs = {name: jax.jit(way).lower(x, experts).compile() for name, way in ways.items()}
    _refuse_difference({name: program(x, experts) for name, program in programs.items()})
    memory = {name: _temporary(program) for name, program in programs.items()}
    candidates = {name: partial(program, x, experts) for name, program in programs.items()}
    candidates["plain"] = partial(jax.jit(jnp.matmul), x, kernel)
    taken = alternate(candidates, settings.rounds)
    tokens = settings.tokens
    return {
        name: Cost(seconds / tokens, memory.get(name, 0) / tokens)
        for name, seconds in taken.items()
    }


def _refuse_difference(found: dict[str, jax.Array]) -> None:
    """Ends the benchmark if two ways differ: a wrong answer's time is worth nothing."""
    for name, out in found.items():
        gap = float(jnp.max(jnp.abs(out - found["all"])))
        if gap > 1e-4 * float(jnp.max(jnp.abs(found["all"]))):
            raise SystemExit(f"computing {name} differs from all by {gap:.2g}")


def _temporary(program: jax.stages.Compiled) -> int:
    """The bytes that a program holds beside its arguments and its result."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _show(settings: Settings, size: tuple[int, int], costs: dict[int, dict[str, Cost]]) -> None:
    """Prints one table: microseconds and KiB a token, and which way `routed` takes."""
    columns = ["experts", "plain", "all experts", "chosen alone", "ragged_dot", "routed takes"]
    rows = []
    for count, found in costs.items():
        drawn = partial(random_experts, count=count, size=size, settings=settings)
        experts = jax.eval_shape(drawn, jax.random.key(0))
        few = selected.worthwhile((settings.tokens, size[0]), experts)
        told = [_told(found.get(name)) for name in ("all", "chosen", "ragged")]
        plain = f"{1e6 * found['plain'].seconds:.1f}"
        rows.append([str(count), plain, *told, "chosen" if few else "all"])
    title = (
        f"One projection, {size[0]} to {size[1]}, {settings.tokens} tokens, rank {settings.rank}, "
        f"top {settings.top_k}: µs (KiB) a token"
    )
    show(title, columns, rows)


def _told(cost: Cost | None) -> str:
    return "-" if cost is None else f"{1e6 * cost.seconds:.1f} ({cost.bytes / 1024:.0f})"


def draw(
    path: Path, found: dict[tuple[int, int], dict[int, dict[str, Cost]]], settings: Settings
) -> None:
    """Draws time a token by the number of experts, a panel for each projection."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (size, costs) in zip(panels, found.items(), strict=True):
        for name, label in (("all", "all experts"), ("chosen", "the chosen alone")):
            times = [1e6 * cost[name].seconds for cost in costs.values()]
            panel.plot(list(costs), times, marker="o", label=label)
        plain: Sequence[float] = [1e6 * cost["plain"].seconds for cost in costs.values()]
        panel.plot(list(costs), plain, color="grey", linestyle="--", label="the projection itself")
        panel.set(xscale="log", yscale="log", xlabel="experts in the library")
        panel.set(ylabel="µs a token", title=f"{size[0]} to {size[1]}")
        panel.legend()
    title = f"routing {settings.tokens} tokens over rank-{settings.rank} experts, top"
    figure.suptitle(f"{title} {settings.top_k}")
    figure.savefig(path, dpi=150)

"""Parameter-efficient modules as pytrees: what a layer gains, not how it is applied."""

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.errors import InputError


@struct.dataclass
class LoRA:
    """A low-rank addition to a projection: the kernel gains `scale * a @ b`.

    Hu et al., "LoRA", section 4.1. `scale` is alpha / rank, or alpha / sqrt(rank) for rslora.
    A `bias` (PEFT's lora_bias) adds `scale * bias` to the output.
    """

    a: jax.Array  # (..., I, R)
    b: jax.Array  # (..., R, O), zero at initialisation
    scale: float = struct.field(pytree_node=False, default=1.0)
    bias: jax.Array | None = None  # (..., O)


@struct.dataclass
class DoRA:
    """A LoRA whose sum with the kernel has the length of its columns set to `magnitude`.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5: each column of
    `kernel + scale * a @ b` is divided by its norm and multiplied by its magnitude. A magnitude of
    0 stands for that norm itself: such a column is LoRA's, so that zeros are the identity.
    """

    a: jax.Array  # (..., I, R)
    b: jax.Array  # (..., R, O), zero at initialisation
    magnitude: jax.Array  # (..., O), the norms of the kernel's columns at initialisation
    scale: float = struct.field(pytree_node=False, default=1.0)


@struct.dataclass
class IA3:
    """A rescaling of a projection's features by `1 + offset`.

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning", section 3.3, stored as an offset from
    one, so that zero is the identity and module arithmetic is plain arithmetic. `on` is "output",
    or "input" for the feed-forward projection whose input PEFT rescales.
    """

    offset: jax.Array  # (..., F)
    on: str = struct.field(pytree_node=False, default="output")


@struct.dataclass
class Experts:
    """A library of LoRA modules at one projection, mixed token by token, or as `shares` say.

    Scales are folded into `b`. `mixing` is "outputs" (PEFT: mix the experts' outputs) or "factors"
    (MTTL and the GenKnowSub code: mix `a` and `b`, then multiply). Just one of `prototypes`,
    `spectrum` and `shares` is there; `lora_jax.routing` says how each routes. Shares whose
    `weighting` is "uniform" are 1/M because there are M experts; all others were given.
    """

    a: jax.Array  # (..., M, I, R)
    b: jax.Array  # (..., M, R, O)
    prototypes: jax.Array | None = None  # (..., M, I), compared with tokens
    top_k: int = struct.field(pytree_node=False, default=3)
    temperature: float = struct.field(pytree_node=False, default=1.0)
    mixing: str = struct.field(pytree_node=False, default="outputs")
    score: str = struct.field(pytree_node=False, default="absolute")  # or "signed"
    inputs: str = struct.field(pytree_node=False, default="raw")  # or "unit", "standard"
    weighting: str = struct.field(pytree_node=False, default="softmax")  # or "uniform", "sigmoid"
    spectrum: jax.Array | None = None  # (..., M, R), how each rank of x·a counts in a score
    shares: jax.Array | None = None  # (..., M), or (..., B, M) by example: the weights themselves
    leading: bool = struct.field(pytree_node=False, default=False)  # prototypes are a's first rank


@struct.dataclass
class Saved:
    """A base weight that was trained whole and goes with the adapter (PEFT's modules_to_save).

    Its path is the weight's own ("embed", "self_attn.q_proj.bias"). The weight becomes `value` plus
    1 - `share` times the base's: what it adds to the base's is then a delta like any other, and a
    sum of such modules is the sum of their values and of their shares.
    """

    value: jax.Array  # as the base holds it: kernels (..., I, O), a layer axis in front
    share: jax.Array | None = None  # (...), 1 unless given: `value` takes the weight's place


@struct.dataclass
class PerExample:
    """Slots that hold modules of one projection, and the slot whose modules each row runs under.

    A slot has one module in every part, all of which apply; a part's zeros are its identity, so a
    slot that needs one kind has zeros in the others, and one of zeros alone is the base. A row
    whose slot does not exist turns to NaN. `compose.slots` makes them.
    """

    parts: tuple["LoRA | DoRA | IA3 | Experts", ...]  # leaves (..., S, the module's own axes)
    rows: jax.Array  # (..., B), a slot for each row of a batch


Module = LoRA | DoRA | IA3 | Experts | Saved | PerExample
Adapter = Mapping[str, Module]  # keyed by the projection's path in a layer: "self_attn.q_proj"

# A projection's path to its sizes: (layers, in, out), or (in, out) where there is just one.
Shapes = Mapping[str, tuple[int, ...]]


def resolve_targets(targets: Iterable[str], shapes: Shapes) -> list[str]:
    """The paths in `shapes` that `targets` name, whole or by their last parts, in table order.

    "all-linear" names them all.
    """
    wanted = list(targets)
    if wanted == ["all-linear"]:
        return list(shapes)
    unknown = [t for t in wanted if not any(_names(t, path) for path in shapes)]
    if unknown:
        raise InputError(
            f"unknown projection {', '.join(map(repr, unknown))}; "
            f"this model has {', '.join(shapes)}"
        )
    return [path for path in shapes if any(_names(t, path) for t in wanted)]


def _names(target: str, path: str) -> bool:
    return path == target or path.endswith("." + target)


def init_lora(
    key: jax.Array,
    shapes: Shapes,
    *,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    rslora: bool = False,
) -> dict[str, LoRA]:
    """A new LoRA on every target of every layer, in float32.

    `a` is uniform within ±1/sqrt(in), as in PEFT; `b` is zero. A projection's draw depends on the
    key and its path alone, so modules that share a seed share their initialisation whatever their
    other targets (PEM, section 3, needs this).
    """
    if rank < 1:
        raise InputError(f"rank must be at least 1; got {rank}")
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank

    def one(path: str) -> LoRA:
        *lead, fan_in, fan_out = shapes[path]
        draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(draw, (*lead, fan_in, rank), jnp.float32, -bound, bound)
        return LoRA(a, jnp.zeros((*lead, rank, fan_out), jnp.float32), scale)

    return {path: one(path) for path in resolve_targets(targets, shapes)}


def init_ia3(shapes: Shapes, sides: Mapping[str, str]) -> dict[str, IA3]:
    """A new IA3 module, the identity: `sides` says which projections, "output" or "input" each.

    `models.ia3_layouts` has PEFT's choice for a family, and the PEM paper's.
    """

    def one(path: str) -> IA3:
        *lead, fan_in, fan_out = shapes[path]
        size = fan_in if sides[path] == "input" else fan_out
        return IA3(jnp.zeros((*lead, size), jnp.float32), sides[path])

    return {path: one(path) for path in resolve_targets(sides, shapes)}


Ranked = TypeVar("Ranked", bound=LoRA | DoRA)


def fold_scale(module: Ranked) -> Ranked:
    """The same delta with `scale` moved into `b` and `bias`."""
    b = (module.scale * module.b).astype(module.b.dtype)
    bias = getattr(module, "bias", None)
    more = {} if bias is None else {"bias": module.scale * bias}
    return replace(module, b=b, scale=1.0, **more)


def describe(adapter: Adapter) -> str:
    """A module in a few words: its kind, ranks, targets and the number of its parameters."""
    if not adapter:
        return "the base model (no module)"
    whole = [path for path, module in adapter.items() if isinstance(module, Saved)]
    inner = {path: module for path, module in adapter.items() if path not in whole}
    kinds = " + ".join(sorted({type(m).__name__ for m in inner.values()}))
    ranks = sorted(
        {m.a.shape[-1] for m in adapter.values() if isinstance(m, LoRA | DoRA | Experts)}
    )
    rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
    count = sum(leaf.size for leaf in jax.tree.leaves(dict(adapter)))
    targets = ", ".join(path.rsplit(".", 1)[-1] for path in inner)
    parts = [f"{kinds}{rank} on {targets}"] if inner else []
    parts += [f"{', '.join(whole)} whole"] if whole else []
    return f"{' with '.join(parts)} ({count:,} parameters)"

"""What a batch costs whose rows run under adapters of their own: against the base, against one
adapter for all rows, and against each adapter's own rows one after the other."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compose.slots import Slots, assigned, make_slots, put
from lora_jax import models
from lora_jax.bases import load_base
from lora_jax.modules import LoRA, PerExample
from lora_jax.project import project
from scripts.timing import alternate, show

TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
COLUMNS = ["median", "against one for all"]


def random_lora(shape: tuple[int, ...], seed: int, rank: int) -> LoRA:
    """A LoRA of a projection (..., in, out) that changes every output."""
    *lead, fan_in, fan_out = shape
    left, right = jax.random.split(jax.random.key(seed))
    a = jax.random.normal(left, (*lead, fan_in, rank)) / fan_in**0.5
    return LoRA(a, 0.01 * jax.random.normal(right, (*lead, rank, fan_out)))


def mixed_forward(
    rows: int, length: tuple[int, ...], adapters: int, rank: int, rounds: int
) -> None:
    """Times SmolLM2's forward pass, to its hidden states, and a hot swap, and prints tables."""
    base = load_base("smollm2-135m")
    shapes: Mapping[str, Any] = models.projections(base.config)
    library = [{p: random_lora(shapes[p], n, rank) for p in TARGETS} for n in range(adapters)]
    slots = make_slots(library[:1], adapters)
    for n, adapter in enumerate(library):
        slots = put(slots, n, adapter)

    @jax.jit
    def hidden(weights, adapter, tokens):
        return models.forward(base.config, weights, adapter, tokens).hidden

    run = partial(hidden, base.weights)
    for time in length:
        tokens = jax.random.randint(jax.random.key(0), (rows, time), 0, base.config.vocabulary)
        candidates = _passes(run, library, slots, tokens)
        taken = alternate(candidates, rounds)
        title = f"SmolLM2-135M, {rows}x{time} tokens, {adapters} LoRA of rank {rank} on q, k, v, o"
        show(title, ["forward", *COLUMNS], _cells(taken))
        mixed, apart = (candidates[name]() for name in list(candidates)[2:])
        plain = run({}, tokens), [run({}, tokens[row : row + 1]) for row in range(rows)]
        told = [f"{_gap(mixed, apart):.0e}", f"{_gap(*plain):.0e}"]
        print("rows together and alone differ by {} of their norm; the base's, by {}".format(*told))
    _swap(slots, library[-1], rounds)


def _passes(run: Any, library: list, slots: Slots, tokens: jax.Array) -> dict[str, Any]:
    """The ways to run a batch, row n under adapter n, counted round."""
    which = np.arange(len(tokens)) % len(library)
    order = np.argsort(which, kind="stable")
    parts = [(library[n], tokens[which == n]) for n in dict.fromkeys(which[order].tolist())]
    mixed = assigned(slots, which[order])
    return {
        "the base": partial(run, {}, tokens),
        "one adapter for all rows": partial(run, library[0], tokens),
        "an adapter for each row": partial(run, mixed, tokens[order]),
        "one pass after the other": lambda: [run(adapter, part) for adapter, part in parts],
    }


def _gap(one: Any, other: Any) -> float:
    """How far two runs of a batch, whole or in parts, are apart over the norm of the second."""
    one, other = (np.concatenate(jax.tree.leaves(run)) for run in (one, other))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _cells(taken: Mapping[str, float]) -> list[list[str]]:
    """A table's rows: each candidate's time, and how much more that is than one adapter's."""
    shared = taken["one adapter for all rows"]
    return [[n, f"{1e3 * t:.1f} ms", f"{100 * (t / shared - 1):+.1f} %"] for n, t in taken.items()]


def _swap(slots: Slots, adapter: Mapping[str, LoRA], rounds: int) -> None:
    """Times putting an adapter into a slot, and prints it."""
    held = [slots]

    def swap() -> Slots:
        held.append(put(held.pop(), 0, adapter))
        return held[0]

    print(f"putting an adapter into a slot: {1e3 * alternate({'': swap}, rounds)['']:.1f} ms")


def in_turn(x: jax.Array, kernel: jax.Array, members: LoRA, rows: np.ndarray) -> jax.Array:
    """PEFT's way at a projection: the base for all rows, then each adapter for its own."""
    y = x @ kernel
    for n in sorted(set(rows.tolist())):
        (own,) = np.nonzero(rows == n)
        y = y.at[own].add(x[own] @ members.a[n] @ members.b[n])
    return y


def mixed_projection(
    rows: int, length: tuple[int, ...], adapters: int, rank: int, rounds: int, width: int = 576
) -> None:
    """Times one projection the same ways, and as PEFT has it, and prints tables."""
    members = random_lora((adapters, width, width), 0, rank)
    one = LoRA(members.a[0], members.b[0])
    kernel = random_lora((width, width), 1, width).a
    which = np.arange(rows) % adapters
    slots = PerExample((members,), jnp.asarray(which))
    run, turns = jax.jit(project), jax.jit(lambda x: in_turn(x, kernel, members, which))
    for time in length:
        x = jax.random.normal(jax.random.key(2), (rows, time, width))
        candidates = {
            "the base": partial(run, x, kernel),
            "one adapter for all rows": partial(run, x, kernel, None, one),
            "an adapter for each row": partial(run, x, kernel, None, slots),
            "each adapter in turn (PEFT's way)": partial(turns, x),
        }
        taken = alternate(candidates, 5 * rounds)
        show(f"One projection, {rows}x{time} tokens", ["projection", *COLUMNS], _cells(taken))

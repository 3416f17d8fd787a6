"""Rotary position embeddings, and the ways in which models scale them to longer contexts.

Pair i of a head's first `width` numbers turns by its position times a frequency, base^(-2i/width)
(Su et al., "RoFormer"). What the kinds of scaling do to the frequencies is in `_frequencies`; their
names and keys are Hugging Face's.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import refuse_all
from lora_jax.fields import is_number, shown

Array = jax.Array


@dataclass(frozen=True)
class Rope:
    """How a model's heads turn with their positions."""

    width: int  # how many of a head's numbers turn, from its first
    base: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0  # how many times longer the context became
    context: int = 0  # what it was before, in positions
    slow: float = 1.0  # pairs that turn so often in that context, or less, slow down by `factor`
    fast: float = 32.0  # and those that turn so often, or more, not at all
    truncate: bool = True  # yarn: its ramp begins and ends at whole pairs
    attention: float = 1.0  # what cosines and sines are multiplied by
    short: tuple[float, ...] = ()  # longrope: what each frequency is divided by in short texts,
    long: tuple[float, ...] = ()  # and in texts longer than `context`

    def __post_init__(self) -> None:
        pairs, factors = -(-self.width // 2), (self.short, self.long)
        wrong = self.kind == "longrope" and any(len(some) != pairs for some in factors)
        found = " and ".join(str(len(some)) for some in factors)
        refuse_all(
            [f"short and long factors are {found}, not {pairs}"] if wrong else [], "longrope"
        )


# Each kind's fields, and what Hugging Face calls them.
_SCALED = {"factor": "factor", "context": "original_max_position_embeddings"}
_KINDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": _SCALED | {"slow": "low_freq_factor", "fast": "high_freq_factor"},
    "yarn": _SCALED
    | {
        "slow": "beta_slow",
        "fast": "beta_fast",
        "truncate": "truncate",
        "attention": "attention_factor",
    },
    "longrope": {
        "context": "original_max_position_embeddings",
        "short": "short_factor",
        "long": "long_factor",
        "attention": "attention_factor",
    },
}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
_MSCALES = ("mscale", "mscale_all_dim")


def _given(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary keys of a config: those of transformers 5, or the older ones around them."""
    inner = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    around = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    before = "original_max_position_embeddings"  # the one around, Phi-3's, goes before the inner
    first = {before: raw[before]} if raw.get(before) is not None else {}
    return around | inner | first | {"kind": inner.get("rope_type", inner.get("type", "default"))}


def problems(raw: Mapping[str, Any], known: Iterable[str] = tuple(_KINDS)) -> list[str]:
    """What a Hugging Face config asks of rotary positions that is not known, or incomplete.

    `known` says which kinds of scaling the family has.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, Mapping):
            return [f"{key} is {shown(raw[key])}, not an object"]
    given = _given(raw)
    kind = given["kind"]
    if kind not in tuple(known):
        return [f"rope scaling {shown(kind)} is not supported ({', '.join(known)} are)"]
    keys = {*_KINDS[kind].values(), "rope_theta", "partial_rotary_factor", *_MSCALES}
    lost = sorted(key for key in _REQUIRED & keys if given.get(key) is None)
    found = [f"rope scaling {kind!r} lacks {', '.join(lost)}"] if lost else []
    return found + [
        f"{key} is {shown(given[key])}, which says nothing of how heads turn"
        for key in sorted(keys)
        if given.get(key) is not None and not _is_known(key, given[key])
    ]


def _is_known(key: str, value: Any) -> bool:
    """Whether a rotary key can have this value."""
    if key == "truncate":
        return isinstance(value, bool)
    if key in ("short_factor", "long_factor"):
        return isinstance(value, list) and all(is_number(one) and one > 0 for one in value)
    most = 1 if key == "partial_rotary_factor" else math.inf
    least = 0 if key in _MSCALES else math.ulp(0)
    return is_number(value) and least <= value <= most


def from_huggingface(raw: Mapping[str, Any], head_width: int) -> Rope:
    """The rotary positions of a Hugging Face config that has no `problems`.

    An absent original context is `max_position_embeddings`, which the config then must have.
    """
    given = _given(raw)
    kind, limit = given["kind"], raw.get("max_position_embeddings", 0)
    fields = {f: given[key] for f, key in _KINDS[kind].items() if given.get(key) is not None}
    fields |= {f: tuple(fields[f]) for f in ("short", "long") if f in fields}
    if kind == "dynamic" or "context" in _KINDS[kind]:
        fields.setdefault("context", limit)
    if "attention" in _KINDS[kind]:
        fields.setdefault("attention", _attention(given, fields["context"], limit))
    width = int(head_width * (given.get("partial_rotary_factor") or 1.0))
    return Rope(width, float(given.get("rope_theta") or 10_000.0), kind, **fields)


def _attention(given: Mapping[str, Any], context: int, limit: int) -> float:
    """The factor on cosines and sines where a config does not say: longrope's, yarn's."""
    factor = given.get("factor") or limit / context
    if factor <= 1:
        return 1.0
    if given["kind"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(context))
    one, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    grown = 0.1 * math.log(factor)
    return (one * grown + 1) / (all_dims * grown + 1) if one and all_dims else grown + 1


def to_huggingface(rope: Rope, head_width: int) -> dict[str, Any]:
    """The keys of a `config.json` that say this, as transformers 5 writes them."""
    given: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.base}
    if rope.width != head_width:
        share = rope.width / head_width
        short = int(share * head_width) < rope.width  # by rounding; a reader multiplies again
        given["partial_rotary_factor"] = math.nextafter(share, 1) if short else share
    for field, key in _KINDS[rope.kind].items():
        value = getattr(rope, field)
        given[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": rope.base, "rope_parameters": given}


def tables(rope: Rope, positions: Array, longest: Array | None = None) -> tuple[Array, Array]:
    """Cosines and sines (B, T, 1, C/2) of the rotary angles at `positions` (B, T), in float32.

    `longest` (B, T) is the last position of each one's text, which longrope and dynamic scaling go
    by (see `Places.ends`); a row is one text by default. transformers goes by the batch's longest.
    Keys in a cache stay as they were turned when their text outgrows its context, as they do there.
    """
    if longest is None:
        longest = jnp.max(positions, axis=-1, keepdims=True)
    frequencies = _frequencies(rope, longest[..., None, None] + 1)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return rope.attention * jnp.cos(angles), rope.attention * jnp.sin(angles)


def _frequencies(rope: Rope, length: Array) -> Array:
    """Each pair's angle from one position to the next, in texts of a length (B, T, 1, 1)."""
    exponents = np.arange(0, rope.width, 2) / rope.width
    plain = rope.base**-exponents
    match rope.kind:
        case "linear":
            plain = plain / rope.factor
        case "llama3" | "yarn":
            kept = _kept(rope, plain)
            plain = plain * (kept + (1 - kept) / rope.factor)
        case "longrope":
            divisors = jnp.where(length > rope.context, np.array(rope.long), np.array(rope.short))
            plain = plain / divisors
        case "dynamic":
            longer = jnp.maximum(length.astype(jnp.float32) / rope.context, 1)
            grown = rope.factor * longer - (rope.factor - 1)
            plain = plain * grown ** (-exponents * rope.width / (rope.width - 2))
    return jnp.asarray(plain, jnp.float32)


def _kept(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """How much of each pair's frequency stays, 0 to 1, between slow pairs and fast ones.

    llama3 goes by how often a pair turns in the original context; yarn (Peng et al., "YaRN",
    section 3.2, in its code's form) by a pair's number between the slowest and the fastest.
    """
    if rope.kind == "llama3":
        turns = rope.context * frequencies / (2 * math.pi)
        return np.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)

    def pair(turns: float) -> float:
        ratio = math.log(rope.context / (2 * math.pi * turns)) / math.log(rope.base)
        return rope.width / 2 * ratio

    first, last = pair(rope.fast), pair(rope.slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.width - 1)
    ramp = (np.arange(len(frequencies)) - first) / max(last - first, 1e-3)
    return 1 - np.clip(ramp, 0, 1)

"""The fields of a Hugging Face `config.json`, each read as what it must be."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_jax.errors import refuse_all

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Fields:
    """A config's fields, and what was found amiss while they were read.

    A field that is absent is `usual`, and missed if there is none. One that is amiss is noted and
    read as 0, so that reading goes on; `refuse` then tells of all that was.
    """

    raw: Mapping[str, Any]
    where: str  # the file, for messages
    problems: list[str] = field(default_factory=list)

    def whole(self, key: str, usual: int | None = None, *, least: int = 1) -> int:
        """A whole number, `least` or more."""
        known = lambda value: type(value) is int and least <= value <= _MOST  # noqa: E731
        return self._read(key, usual, known, f"a whole number from {least} to {_MOST}") or 0

    def optional(self, key: str, *, least: int = 1) -> int | None:
        """A whole number, or None where it is absent or null."""
        return None if self.raw.get(key) is None else self.whole(key, least=least)

    def number(self, key: str, usual: float) -> float:
        """A number over 0."""
        known = lambda value: is_number(value) and value > 0  # noqa: E731
        return self._read(key, usual, known, "a number over 0") or 0

    def flag(self, key: str, usual: bool) -> bool:
        """Whether something is so."""
        return bool(self._read(key, usual, lambda value: type(value) is bool, "true or false"))

    def table(self, key: str) -> Mapping[str, Any]:
        """An object; an empty one where it is absent or null."""
        known = lambda value: value is None or isinstance(value, Mapping)  # noqa: E731
        return self._read(key, {}, known, "an object") or {}

    def one_of(self, key: str, known: Iterable[Any], usual: Any = None) -> Any:
        """One of the values that are known, the first of them unless another is `usual`."""
        known = tuple(known)
        value = self.raw.get(key, known[0] if usual is None else usual)
        told = f"{', '.join(map(str, known))} {'is' if len(known) == 1 else 'are'}"
        self.expect(value in known, f"{key} {shown(value)} is not supported ({told})")
        return value if value in known else known[0]

    def expect(self, fits: bool, problem: str) -> None:
        """Notes a problem unless what was read fits."""
        if not fits:
            self.problems.append(problem)

    def refuse(self, others: Iterable[str] = ()) -> None:
        """Refuses the config if anything was amiss, or if there are other problems."""
        refuse_all(list(dict.fromkeys([*self.problems, *others])), self.where)

    def heads(self, width: str, heads: str) -> tuple[int, int]:
        """How wide the model is and how many heads share that."""
        size, count = self.whole(width), self.whole(heads)
        fits = count == 0 or size % count == 0
        self.expect(fits, f"{width} {size} does not divide into {count} heads ({heads})")
        return size, count

    def sizes(self) -> dict[str, Any]:
        """What most decoders' configs have, by what a family's `Config` calls it."""
        if self.raw.get("head_dim") is None:
            width, heads = self.heads("hidden_size", "num_attention_heads")
        else:
            width, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        kv_heads = self.optional("num_key_value_heads") or heads
        head_width = self.optional("head_dim") or width // max(heads, 1)
        fits = kv_heads == 0 or heads % kv_heads == 0
        self.expect(fits, f"{heads} heads do not share {kv_heads} num_key_value_heads evenly")
        self.expect(head_width % 2 == 0, f"heads are {head_width} wide; their halves turn in pairs")
        return {
            "vocabulary": self.whole("vocab_size"),
            "width": width,
            "hidden": self.whole("intermediate_size"),
            "layers": self.whole("num_hidden_layers"),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": head_width,
            "context": self.whole("max_position_embeddings"),
        }

    def layer_types(self, count: int) -> list[str]:
        """The kinds of the model's layers, FULL or SLIDING; empty where they are not listed."""
        types = self.raw.get("layer_types") or []
        if not isinstance(types, list):
            self.problems.append(f"layer_types {shown(types)} is not a list")
            return []
        unknown = [kind for kind in types if kind not in (FULL, SLIDING)]
        self.problems.extend(f"a layer of type {shown(k)} is not supported" for k in unknown)
        fits = len(types) in (0, count)
        self.expect(fits, f"layer_types has {len(types)} layers, not {count}")
        return [] if unknown or not fits else types

    def _read(self, key: str, usual: Any, known: Callable[[Any], bool], kind: str) -> Any:
        """A field's value if it is a known one; else None, and a problem."""
        if key not in self.raw and usual is None:
            self.problems.append(f"{key} is missing")
            return None
        value = self.raw.get(key, usual)
        self.expect(known(value), f"{key} is {shown(value)}, not {kind}")
        return value if known(value) else None


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can be."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def shown(value: Any) -> str:
    """A value as Python has it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

"""All merging methods by name, and what each can be used on."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from compose.merging.elementwise import ELEMENTWISE
from compose.merging.slerp import slerp_deltas
from compose.merging.spectral import SPECTRAL, VECTORS

SUMS = ("linear", "cat", "svd")  # weighted sums, exact in delta space
LOW_RANK = {"slerp": slerp_deltas, **SPECTRAL}  # deltas from their factors, exactly
VECTOR = ELEMENTWISE | VECTORS  # what has a form for IA3
# Means, whose results do not grow with the weights: in factor space scales go into the factors.
MEANS = ("ties_mergekit", "della_mergekit", "fisher")
INNER = tuple(name for name in ELEMENTWISE if name != "fisher")  # what merges coordinates
METHODS = tuple(dict.fromkeys([*SUMS, *ELEMENTWISE, *SPECTRAL]))

Options = dict[str, Parameter]


def function_of(method: str, space: str = "delta") -> Callable[..., Any]:
    """The function that a method is in a space, for a LoRA; `linear` also for `cat` and `svd`."""
    if space == "delta" and method in LOW_RANK:
        return LOW_RANK[method]
    return ELEMENTWISE["linear" if method in SUMS else method]


def options_of(method: str, inner: str | None = None) -> Options:
    """The options of a method, by name, with their defaults; what the driver fills in is left out.

    A method that merges coordinates by another, its option `inner`, has that one's options too.
    """
    known = signature(function_of(method)).parameters
    found = {n: p for n, p in known.items() if p.kind is Parameter.KEYWORD_ONLY and n != "key"}
    if any(p.kind is Parameter.VAR_KEYWORD for p in known.values()):
        found = options_of(inner or found["inner"].default) | found
    return found


def draws(method: str, inner: str | None = None) -> bool:
    """Whether a method leaves something to chance."""
    known = signature(function_of(method)).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in known.values()):
        return draws(inner or known["inner"].default)
    return "key" in known

"""Members' weights as a recipe writes them, to weights by projection and layer.

A pattern is matched against a projection's path, whole or from one of its parts on: "q_proj",
"*.q_proj" and "self_attn.*" all mean self_attn.q_proj. The first that fits counts. Numbers over
depth go from the first layer to the last in straight lines, as mergekit's gradients do.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compose.recipe.value import Depth, Share
from compose.weights import Mixing, Weight, over_depth
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, DoRA, LoRA, Module

WANTED = (
    "a number, a list of numbers over depth, or a table of either by projection such as "
    '{"*.q_proj": 0.5, "*": 1}'
)


class ShareError(InputError):
    """Weights that do not go with the projections of the modules."""


def is_share(value: Any) -> bool:
    """Whether a value can be a member's weight."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(p, str) and _is_depth(v) for p, v in value.items())
    return _is_depth(value)


def _is_depth(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, or an array, which may be traced."""
    if hasattr(value, "dtype"):
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mixing(share: Share, adapter: Adapter) -> Mixing:
    """A member's weight at each projection of `adapter`, or one number where that is all there is.

    `adapter` has every projection that any member changes, so that a weight counts in a mean where
    its member changes nothing.
    """
    if isinstance(share, Mapping):
        return {path: _over(_chosen(share, path), path, m) for path, m in adapter.items()}
    if isinstance(share, list | tuple):
        return {path: _over(share, path, module) for path, module in adapter.items()}
    return share


def refuse_idle(shares: Sequence[Share], adapters: Sequence[Adapter]) -> None:
    """Refuses patterns that fit no projection of any member."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    patterns = dict.fromkeys(p for share in shares if isinstance(share, Mapping) for p in share)
    idle = [p for p in patterns if p != "*" and not any(_fits(p, path) for path in paths)]
    if idle:
        raise ShareError(
            f"weights for {', '.join(idle)}, which fit no projection; the members change "
            f"{', '.join(paths)}"
        )


def _fits(pattern: str, path: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def _chosen(share: Mapping[str, Depth], path: str) -> Depth:
    """What the first pattern that fits a path gives it."""
    for pattern, value in share.items():
        if _fits(pattern, path):
            return value
    raise ShareError(f'no weight for {path}; end the table of weights with "*" for all others')


def _over(points: Depth, path: str, module: Module) -> Weight:
    """A weight at each of a projection's layers, or the one for all."""
    if not isinstance(points, list | tuple):
        return points
    match module:
        case LoRA(a=x) | DoRA(a=x) if x.ndim == 3:
            return over_depth(points, len(x))
        case IA3(offset=x) if x.ndim == 2:
            return over_depth(points, len(x))
    raise ShareError(
        f"{path} is there once, not in every layer; give it a number of its own: "
        f'{{"{path}": 1, "*": [0, 1]}}'
    )

"""lm-evaluation-harness's requests as rows to score, and as ways to sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval import items
from eval.generation import Sampling
from eval.items import Item, Span
from lora_jax.errors import InputError, refuse_all

Request = tuple[Any, list[int], list[int]]  # its text, the context and the continuation in tokens
_ABREAST = 16  # continuations of one context in a row at most
_SAMPLED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


def together(requests: Sequence[Request], room: int) -> list[list[int]]:
    """The requests' indices in groups that share a row: neighbours that share a context.

    A row has 16 continuations at most, and no more tokens than `room` with its context.
    """
    groups: list[list[int]] = []
    for n, (_, context, continuation) in enumerate(requests):
        group = groups[-1] if groups else []
        size = len(context) + sum(len(requests[m][2]) for m in group) + len(continuation)
        alike = bool(group) and requests[group[0]][1] == context
        if alike and size <= room and len(group) < _ABREAST:
            group.append(n)
        else:
            groups.append([n])
    return groups


def item(group: Sequence[Request], room: int) -> Item:
    """Requests of one context as an item of which each continuation counts.

    Of a text that is longer than `room` the beginning is left out.
    """
    spans = []
    for text, context, continuation in group:
        if not 0 < len(continuation) <= room:
            where = "a window" if text is None else repr(text[1][:40])
            raise InputError(f"{where} has {len(continuation)} tokens, of 1 to {room} to score")
        tokens = np.array([*context, *continuation][-room - 1 :], np.int32)
        spans.append(Span(tokens, np.arange(len(tokens)) >= len(tokens) - len(continuation)))
    return items.item(spans, (1.0,) * len(spans))


def sampling(kwargs: Mapping[str, Any], seed: int) -> Sampling:
    """How a request's tokens are chosen; what has no counterpart here is refused by name."""
    unknown = sorted(kwargs.keys() - set(_SAMPLED))
    refuse_all([f"{n}={kwargs[n]!r} is not supported" for n in unknown], "generation arguments")
    heat = kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0
    top_p, top_k = kwargs.get("top_p") or 1.0, kwargs.get("top_k") or 0
    return Sampling(kwargs["max_gen_toks"], float(heat), float(top_p), int(top_k), seed)

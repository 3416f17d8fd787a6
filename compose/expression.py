"""Expressions over modules: a text and its named inputs to the module that it describes."""

from compose.arithmetic import Space
from compose.geometry import recompress_members
from compose.interpreter import Inputs, Scope, module_of
from compose.library import Library
from compose.merging.merge import Errors
from compose.routing.build import applied
from compose.syntax import ExpressionError, names, parse, refuse_unknown
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

__all__ = [
    "ExpressionError",
    "evaluate",
    "names",
    "parse",
    "ready",
    "resolve",
    "resolve_with_losses",
]


def evaluate(
    text: str, inputs: Inputs, *, space: Space = "delta", rank: int | None = None
) -> Adapter | Library:
    """The module an expression describes, ready for a forward pass; or a library left unrouted.

    In factor space `w*m` weighs both factors by |w| and -m negates b, so that `x - 0.4*y` is PEM's
    x ⊕ (⊖ 0.4y). `rank` recompresses what delta space has made larger.
    """
    value = resolve(text, inputs, space=space)
    if rank is not None:
        refuse_rank(space, rank)
        value, _ = recompress_members(value, rank)
    return ready(value)


def ready(value: Adapter | Library) -> Adapter | Library:
    """A value as a forward pass takes it; a library that is not to be routed is left one."""
    routed = isinstance(value, Library) and value.routing is not None
    return applied(value) if routed else value


def resolve(text: str, inputs: Inputs, *, space: Space = "delta") -> Adapter | Library:
    """What an expression describes, where a routed adapter is still a library with `routing`."""
    return resolve_with_losses(text, inputs, space=space)[0]


def resolve_with_losses(
    text: str, inputs: Inputs, *, space: Space = "delta"
) -> tuple[Adapter | Library, dict[str, Errors]]:
    """The same, and what each merge in it lost when it was brought down to a rank, by its text."""
    refuse_unknown(text, inputs)
    scope = Scope(text, inputs, space)
    try:
        return module_of(parse(text), scope), scope.lost
    except RecursionError:
        raise InputError("the expression is nested too deeply; compose it in steps") from None


def refuse_rank(space: Space, rank: int) -> None:
    """Refuses a rank below 1, and any rank in factor space, whose sums keep theirs."""
    if rank < 1:
        raise InputError(f"rank must be at least 1; got {rank}")
    if space != "delta":
        raise InputError("a rank recompresses deltas; factor space keeps its ranks: drop the rank")

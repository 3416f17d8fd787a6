"""The functions that an expression may call; their parameters are the ones a user sees."""

from collections.abc import Callable
from dataclasses import replace

from compose import arithmetic
from compose.arithmetic import Space
from compose.arrow import routing_for
from compose.genknowsub import without
from compose.library import Library, each, join
from lora_jax.modules import Adapter

Value = Adapter | Library


def mean(*modules: Library, space: Space) -> Adapter:
    """The average of modules; a library stands for its members."""
    return arithmetic.average(join(modules).adapters, space=space)


def negate(module: Value, strength: float = 1.0, *, space: Space) -> Value:
    """-strength times the module's delta, in either space."""
    return each(lambda m: arithmetic.negate(m, strength), module)


def analogy(task: Value, target: Value, source: Value, weight: float, *, space: Space) -> Value:
    """weight·task + (1 - weight)·(target - source)."""
    return each(
        lambda x, y, z: arithmetic.analogy(x, y, z, weight, space=space), task, target, source
    )


def detox(instructed: Value, toxic: Value, strength: float, *, space: Space) -> Value:
    """instructed + strength·(instructed - toxic), as PEM does it for Alpaca-LoRA."""
    return each(lambda x, y: arithmetic.detox(x, y, strength, space=space), instructed, toxic)


def gks(task: Value, general: Value, strength: float = 1.0, *, space: Space) -> Value:
    """The task module less strength times the general one, as GenKnowSub does it."""
    return each(lambda x, y: without(x, y, strength=strength, space=space), task, general)


def library(*modules: Library, space: Space) -> Library:
    """The modules as one library."""
    return join(modules)


def arrow(
    *modules: Library,
    top_k: int | None = None,
    temperature: float = 1.0,
    mixing: str = "outputs",
    space: Space,
) -> Library:
    """The modules as one library that is routed by Arrow when it is used."""
    whole = join(modules)
    return replace(whole, routing=routing_for(whole, top_k, temperature, mixing))


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "mean": mean,
    "negate": negate,
    "analogy": analogy,
    "detox": detox,
    "gks": gks,
    "library": library,
    "arrow": arrow,
}

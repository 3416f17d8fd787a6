"""The one place where a module changes a projection; model files never know which module it is."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.dora import gain
from lora_jax.modules import IA3, DoRA, Experts, LoRA, Module, PerExample
from lora_jax.per_example import own
from lora_jax.quantize import dense
from lora_jax.routing import routed, routed_all


@struct.dataclass
class Dropout:
    """Dropout on a module's input while it trains; inference passes none."""

    key: jax.Array
    rate: float = struct.field(pytree_node=False, default=0.0)


def project(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    module: Module | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """A projection's output (..., O) for x (..., I), changed by its module if it has one.

    A quantized kernel is given back its numbers here, and only while they are needed.
    """
    kernel = dense(kernel, x.dtype)

    def plain(x: jax.Array) -> jax.Array:
        y = x @ kernel
        return y if bias is None else y + bias

    return changed(plain, x, kernel, module, dropout)


def project_all(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
    modules: Sequence[Module | None],
    dropouts: Sequence[Dropout | None],
) -> list[jax.Array]:
    """`project` for several projections of one x (..., I); their libraries meet it together."""
    libraries = [module for module in modules if isinstance(module, Experts)]
    added = iter(routed_all(x, libraries) if libraries else [])
    rest = [None if isinstance(module, Experts) else module for module in modules]
    plain = map(project, repeat(x), kernels, biases, rest, dropouts)
    return [
        y + next(added) if isinstance(module, Experts) else y
        for y, module in zip(plain, modules, strict=True)
    ]


def changed(
    plain: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    module: Module | None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """What `plain`, a projection by `kernel` (I, O), gives for x (..., I) under its module.

    A user's own layer is such a projection, with a bias, a precision and a type of its own.
    """
    if isinstance(module, PerExample):
        return _changed_by_row(plain, x, kernel, module, dropout)
    x = _entering(x, module)
    return _leaving(plain(x), x, module, dropout, kernel)


def _changed_by_row(
    plain: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    module: PerExample,
    dropout: Dropout | None,
) -> jax.Array:
    """What `plain` gives for all rows of x (B, ..., I) at once, each changed by its own modules."""
    parts = own(module)
    drops = dropout and Dropout(jax.random.split(dropout.key, len(x)), dropout.rate)
    for part in parts:
        x = jax.vmap(_entering)(x, part)
    y = plain(x)
    for part in parts:
        y = jax.vmap(partial(_leaving, kernel=kernel))(y, x, part, drops)
    return y


def _entering(x: jax.Array, module: Module | None) -> jax.Array:
    """A projection's input (..., I) as its module lets it in."""
    if isinstance(module, IA3) and module.on == "input":
        return x * _factor(module, x)
    return x


def _leaving(
    y: jax.Array, x: jax.Array, module: Module | None, dropout: Dropout | None, kernel: jax.Array
) -> jax.Array:
    """A projection's output y (..., O) for x (..., I), with what its module makes of it."""
    match module:
        case None | IA3(on="input"):
            return y
        case IA3():
            return y * _factor(module, y)
        case LoRA():
            y = y + low_rank(dropped(x, dropout), module)
            return y if module.bias is None else y + (module.scale * module.bias).astype(y.dtype)
        case DoRA():
            return y + _magnified(dropped(x, dropout), kernel, module)
        case Experts():
            return y + routed(x, module)
    raise TypeError(f"no way to apply a {type(module).__name__} to a projection")


def low_rank(x: jax.Array, module: LoRA | DoRA) -> jax.Array:
    """x·a·b (..., O) for x (..., I), scaled: two thin products."""
    return x @ module.a.astype(x.dtype) @ (module.scale * module.b).astype(x.dtype)


def _magnified(x: jax.Array, kernel: jax.Array, module: DoRA) -> jax.Array:
    """What DoRA adds (..., O) to the base's output: (g - 1)·x·kernel + g·x·a·b, with its gain g.

    As in PEFT dropout reaches both terms; XLA shares x·kernel with the base where there is none.
    """
    g = gain(kernel, module)
    return ((g - 1).astype(x.dtype) * (x @ kernel)) + g.astype(x.dtype) * low_rank(x, module)


def _factor(module: IA3, like: jax.Array) -> jax.Array:
    return (1 + module.offset).astype(like.dtype)


def dropped(x: jax.Array, dropout: Dropout | None) -> jax.Array:
    """x with entries zeroed at the dropout's rate and the rest scaled up to keep the mean."""
    if dropout is None or dropout.rate == 0:
        return x
    keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, x.shape)
    return jnp.where(keep, x / (1 - dropout.rate), 0).astype(x.dtype)

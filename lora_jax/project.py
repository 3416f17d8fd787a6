"""The one place where a module changes a projection; model files never know which module it is."""

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax.modules import IA3, Experts, LoRA, Module
from lora_jax.routing import routed


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
    """A projection's output (..., O) for x (..., I), changed by its module if it has one."""
    if isinstance(module, IA3) and module.on == "input":
        x = x * _factor(module, x)
    y = x @ kernel
    if bias is not None:
        y = y + bias
    match module:
        case None | IA3(on="input"):
            return y
        case IA3():
            return y * _factor(module, y)
        case LoRA():
            inner = dropped(x, dropout) @ module.a.astype(x.dtype)
            return y + inner @ (module.scale * module.b).astype(x.dtype)
        case Experts():
            return y + routed(x, module)
    raise TypeError(f"no way to apply a {type(module).__name__} to a projection")


def _factor(module: IA3, like: jax.Array) -> jax.Array:
    return (1 + module.offset).astype(like.dtype)


def dropped(x: jax.Array, dropout: Dropout | None) -> jax.Array:
    """x with entries zeroed at the dropout's rate and the rest scaled up to keep the mean."""
    if dropout is None or dropout.rate == 0:
        return x
    keep = jax.random.bernoulli(dropout.key, 1 - dropout.rate, x.shape)
    return jnp.where(keep, x / (1 - dropout.rate), 0).astype(x.dtype)

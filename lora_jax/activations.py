"""Activation functions by the names that Hugging Face's configs have for them."""

from functools import partial

import jax
import jax.numpy as jnp

_exact = partial(jax.nn.gelu, approximate=False)
_by_tanh = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS = {
    "gelu": _exact,
    "gelu_python": _exact,
    "gelu_new": _by_tanh,
    "gelu_fast": _by_tanh,
    "gelu_accurate": _by_tanh,
    "gelu_pytorch_tanh": _by_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

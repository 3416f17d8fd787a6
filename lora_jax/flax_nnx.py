"""Modules on a user's own NNX model, whose class and object stay as they are.

A copy of the model gets each module as one more parameter of its layer, so what NNX does to the
layer's kernel (nnx.scan, nnx.vmap, nnx.split) it does to the module; the layer's class becomes
one that calls its own under the module.
"""

from functools import cache
from typing import Any, TypeVar

import jax
from flax import nnx

from lora_jax.contraction import Contraction, along, einsum, refuse_misfits
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

M = TypeVar("M", bound=nnx.Module)
CALLS = tuple(kind.__call__ for kind in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum))


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The sizes (in, out) of the kernels that a module can change, by path: "blocks.0.mlp.up".

    They are those of nnx.Linear, nnx.LinearGeneral and nnx.Einsum layers that contract plainly. A
    layer that is shared has the first of its paths. Layers stacked by nnx.vmap have their axis in
    front: (N, in, out).
    """
    return {path: how.shape(layer.kernel.shape) for path, (layer, how) in _layers(model).items()}


def kernels(model: nnx.Module) -> dict[str, jax.Array]:
    """The kernels that `shapes` tells of, as (..., in, out): what `dora.with_magnitudes` needs."""
    return {path: how.matrix(layer.kernel[...]) for path, (layer, how) in _layers(model).items()}


def apply(model: M, adapter: Adapter) -> M:
    """A copy of a model that computes under an adapter's modules.

    Pure in model and adapter: it jits, vmaps and differentiates by either. The copy shares the
    model's arrays; what a call updates (batch statistics, dropout's counts) it updates in the copy.
    """
    refuse_misfits(adapter, shapes(model))
    copy = nnx.clone(model)
    layers = _layers(copy)
    for path, module in adapter.items():
        layer, _ = layers[path]
        layer.lora_jax, layer.lora_jax_path = nnx.Param(module), path
        # The same object, so that whatever shares the layer or reads its attributes still can.
        object.__setattr__(layer, "__class__", _changed(type(layer)))
    return copy


def merge(model: M, adapter: Adapter) -> M:
    """A copy of a model whose kernels alone compute what `apply`'s copy computes."""
    refuse_misfits(adapter, shapes(model))
    copy = nnx.clone(model)
    layers = _layers(copy)
    for path, module in adapter.items():
        layer, how = layers[path]
        old = (layer.kernel, layer.bias)
        bias = None if layer.bias is None else layer.bias[...]
        new = how.merged(path, module, layer.kernel[...], bias)
        for name, variable, value in zip(("kernel", "bias"), old, new, strict=True):
            if value is not None:  # another variable: this one may be another layer's too
                setattr(layer, name, variable.replace(value))
    return copy


def _layers(model: nnx.Module) -> dict[str, tuple[Any, Contraction]]:
    """The layers that a module can change, and how they use their kernels, by path."""
    found = {}
    for path, layer in nnx.iter_modules(model):
        how = _contraction(layer) if type(layer).__call__ in CALLS else None
        if how is not None:
            found[".".join(map(str, path))] = (layer, how)
    return found


def _contraction(layer: Any, equation: str | None = None) -> Contraction | None:
    """How a layer uses its kernel; None if that is no plain contraction."""
    match layer:
        case nnx.Linear():
            return along([-1])
        case nnx.LinearGeneral():
            return None if layer.batch_axis else along(layer.axis, len(layer.out_features))
        case nnx.Einsum():
            return einsum(equation or layer.einsum_str)
    return None


@cache
def _changed(kind: Any) -> type:
    """The class of a layer of this kind that holds a module: its call is made under it."""

    def call(self: Any, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        asked = dict(zip(("einsum_str",), args, strict=False)) | options
        how = _contraction(self, asked.get("einsum_str"))
        if how is None:
            raise InputError(
                f"{self.lora_jax_path} is called with {asked['einsum_str']!r}, which is no plain "
                f"contraction: no module can change it"
            )
        bias = None if self.bias is None else self.bias[...]
        held = (inputs, self.kernel[...], bias)
        x, kernel, _ = self.promote_dtype(held, dtype=self.dtype)

        def own(x: jax.Array) -> jax.Array:
            return kind.__call__(self, x, *args, **options)

        return how.changed(own, x, kernel, self.lora_jax_path, self.lora_jax.get_value())

    return type(kind.__name__, (kind,), {"__call__": call})

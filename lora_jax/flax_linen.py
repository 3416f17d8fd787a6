"""Modules on a user's own Linen model, whose class stays as it is.

A module is put beside its kernel in `params`, and what flax does to the kernel it then does to
the module: layers of nn.scan and nn.vmap take their own part of it, nn.remat keeps it, and a
layer that is called twice has it twice. The layer's call is intercepted and changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from typing import Any, cast

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.contraction import Contraction, along, einsum, refuse_misfits
from lora_jax.errors import InputError
from lora_jax.modules import Adapter

Variables = Mapping[str, Any]
BESIDE = "lora_jax"  # what a module is called beside its kernel
CALLS = tuple(kind.__call__ for kind in (nn.Dense, nn.DenseGeneral, nn.Einsum))


def shapes(
    model: nn.Module, variables: Variables, *inputs: Any, **options: Any
) -> dict[str, tuple[int, ...]]:
    """The sizes (in, out) of the kernels that a module can change, by path: "blocks_0.mlp.up".

    They are those of the nn.Dense, nn.DenseGeneral and plain nn.Einsum layers that a call of the
    model meets. Layers that flax stacks (nn.scan, nn.vmap) have their axis in front: (N, in, out).
    Nothing is computed: `variables` and `inputs` are arrays or their `jax.ShapeDtypeStruct`s (of
    `jax.eval_shape(model.init, key, *inputs)`); `options` go to `model.apply` as they are.
    """
    layers, found = _layers(variables), _contractions(model, variables, inputs, options)
    return {path: how.shape(layers[path].kernel.shape) for path, how in found.items()}


def kernels(
    model: nn.Module, variables: Variables, *inputs: Any, **options: Any
) -> dict[str, jax.Array]:
    """The kernels that `shapes` tells of, as (..., in, out): what `dora.with_magnitudes` needs."""
    layers, found = _layers(variables), _contractions(model, variables, inputs, options)
    return {path: how.matrix(layers[path].kernel) for path, how in found.items()}


def apply(
    model: nn.Module, variables: Variables, adapter: Adapter, *inputs: Any, **options: Any
) -> Any:
    """What `model.apply(variables, *inputs, **options)` gives under an adapter's modules.

    Pure in variables and adapter: it jits, vmaps and differentiates by either. An empty adapter is
    the model itself.
    """
    refuse_misfits(adapter, dict.fromkeys(_layers(variables)))
    with nn.intercept_methods(_interceptor()):
        return model.apply(_with(variables, adapter), *inputs, **options)


def merge(
    model: nn.Module, variables: Variables, adapter: Adapter, *inputs: Any, **options: Any
) -> dict[str, Any]:
    """Variables with which the model computes alone what `apply` computes.

    The inputs are those of `shapes`: only a call shows how a layer uses its kernel.
    """
    layers, found = _layers(variables), _contractions(model, variables, inputs, options)
    sizes = {path: how.shape(layers[path].kernel.shape) for path, how in found.items()}
    refuse_misfits(adapter, sizes)
    params = _flat(variables)
    for path, module in adapter.items():
        places = [(*layers[path].keys, name) for name in ("kernel", "bias")]
        old = [params.get(place) for place in places]
        new = found[path].merged(path, module, *meta.unbox(old))
        for place, box, value in zip(places, old, new, strict=True):
            if value is not None:
                params[place] = meta.replace_boxed(box, value)
    return {**variables, "params": unflatten_dict(params)}


def _flat(variables: Variables) -> dict[tuple[str, ...], Any]:
    """The params by their places, without modules of an earlier call (of one with `mutable`)."""
    params = cast(dict[tuple[str, ...], Any], flatten_dict(variables.get("params", {})))
    return {keys: value for keys, value in params.items() if keys[-1] != BESIDE}


@dataclass(frozen=True)
class _Layer:
    """A layer's place among params, and its kernel."""

    keys: tuple[str, ...]
    kernel: Any


def _layers(variables: Variables) -> dict[str, _Layer]:
    """The layers that have a kernel, by path."""
    kernels = {keys[:-1]: x for keys, x in _flat(variables).items() if keys[-1] == "kernel"}
    return {".".join(keys): _Layer(keys, meta.unbox(kernel)) for keys, kernel in kernels.items()}


def _with(variables: Variables, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with modules beside their kernels."""
    params, layers = _flat(variables), _layers(variables)
    for path, module in modules.items():
        layer = layers[path]
        params[*layer.keys, BESIDE] = _Beside(module, path, layer.kernel.shape)
    return {**variables, "params": unflatten_dict(params)}


class _Beside(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A module on its way to its layer; flax tells it of each axis that it takes off."""

    module: Any
    path: str = struct.field(pytree_node=False)
    kernel: tuple[int, ...] = struct.field(pytree_node=False)  # its shape

    def unbox(self) -> Any:
        """The module, as flax asks for what a box holds."""
        return self.module

    def replace_boxed(self, val: Any) -> "_Beside":
        """The same box around another module."""
        return self.replace(module=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Beside":
        """The box as it is: nothing is initialised through it."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Beside":
        """The box of one layer's module; a stack that modules do not lie in is refused."""
        count = self.kernel[0]
        if index != 0:
            raise InputError(
                f"{self.path}: the model stacks its layers on axis {index} of their params; "
                f"modules need them on axis 0 (variable_axes={{'params': 0}})"
            )
        if any(leaf.shape[:1] != (count,) for leaf in jax.tree.leaves(self.module)):
            raise InputError(
                f"{self.path}: the model stacks {count} layers here, and so must the module's "
                f"arrays in front; flax_linen.shapes has them as ({count}, in, out)"
            )
        return self.replace(kernel=self.kernel[1:])


def _interceptor(found: dict[str, Contraction] | None = None) -> Callable[..., Any]:
    """What changes the layers that have a module beside their kernel.

    Or, given a dict, changes nothing and notes in it how each layer uses its kernel.
    """

    def intercept(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """A layer's call, under the module that lies beside its kernel if one does."""
        layer = context.module
        beside = None if layer.scope is None else layer.get_variable("params", BESIDE)
        if beside is None or _is_around(layer, context.method_name):
            return next_call(*args, **kwargs)
        call = dict(zip(("inputs", "einsum_str"), args, strict=False)) | kwargs
        how = _contraction(layer, call.get("einsum_str"))
        if found is None:
            return _changed(layer, beside, how, next_call, **call)
        if how is not None:
            found[beside.path] = how
        return next_call(*args, **kwargs)

    return intercept


def _is_around(layer: nn.Module, method: str) -> bool:
    """Whether a call is not yet a layer's own: lifted (nn.remat(nn.Dense)), it comes again."""
    own = type(layer).__call__
    known = unwrap(own) in map(unwrap, CALLS)
    return known and (own not in CALLS or method != "__call__")


def _contraction(layer: Any, equation: str | None) -> Contraction | None:
    """How a layer uses its kernel; None if that is no plain contraction, or it is not flax's."""
    if type(layer).__call__ not in CALLS:
        return None
    match layer:
        case nn.Dense():
            return along([-1])
        case nn.DenseGeneral(features=features, axis=axis, batch_dims=()):
            return along(_several(axis), len(_several(features)))
        case nn.Einsum(einsum_str=own) if asked := equation or own:
            return einsum(asked)
    return None


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _changed(
    layer: Any,
    beside: _Beside,
    how: Contraction | None,
    call: Callable[..., jax.Array],
    inputs: jax.Array,
    **options: Any,
) -> jax.Array:
    """A layer's output under the module beside its kernel."""
    if how is None:
        raise InputError(
            f"{beside.path} is a {type(layer).__name__} that no module can change; one can change "
            f"nn.Dense, nn.DenseGeneral without batch_dims, and nn.Einsum of a plain contraction"
        )
    held = meta.unbox([layer.get_variable("params", name) for name in ("kernel", "bias")])
    x, kernel, _ = layer.promote_dtype(inputs, *held, dtype=layer.dtype)
    return how.changed(partial(call, **options), x, kernel, beside.path, beside.module)


def _contractions(
    model: nn.Module, variables: Variables, inputs: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Contraction]:
    """How each layer that a call of the model meets uses its kernel, by path."""
    found: dict[str, Contraction] = {}

    def trace(variables: Variables, *inputs: Any) -> None:
        """A call that only notes what each layer does."""
        probes = {path: layer.kernel for path, layer in _layers(variables).items()}
        with nn.intercept_methods(_interceptor(found)):
            model.apply(_with(variables, probes), *inputs, **options)

    jax.eval_shape(trace, variables, *inputs)
    return found

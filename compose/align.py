"""Modules brought together, so that their tensors can meet: one kind, shape, scale and rank."""

from collections.abc import Sequence

import jax.numpy as jnp

from lora_jax.errors import InputError
from lora_jax.modules import (
    IA3,
    Adapter,
    DoRA,
    Experts,
    LoRA,
    Module,
    PerExample,
    Saved,
    fold_scale,
)


def by_projection(adapters: Sequence[Adapter]) -> dict[str, list[Module | None]]:
    """What each adapter has at every projection that any of them changes; None where nothing.

    Refuses adapters that do not fit together: of two kinds at one projection, or of two models.
    """
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    table = {path: [adapter.get(path) for adapter in adapters] for path in paths}
    for path, modules in table.items():
        forms = sorted({_form(module) for module in modules if module is not None})
        if len(forms) > 1:
            raise InputError(
                f"{path}: cannot combine {' with '.join(forms)}; "
                f"modules must be of one kind and one base model"
            )
    return table


def _form(module: Module) -> str:
    """What must agree before modules can be combined, in words."""
    match module:
        case LoRA(a=a, b=b, bias=bias):
            kind = "LoRA" if bias is None else "LoRA with a bias"
            return f"{kind} ({_layers(a.shape[:-2])}, {a.shape[-2]} to {b.shape[-1]})"
        case DoRA(a=a, b=b):
            settings = f"rank {a.shape[-1]}, scale {module.scale:g}"
            size = f"{a.shape[-2]} to {b.shape[-1]}"
            return f"DoRA ({_layers(a.shape[:-2])}, {size}, {settings})"
        case IA3(offset=offset, on=on):
            return f"IA3 ({_layers(offset.shape[:-1])}, {offset.shape[-1]} on its {on})"
        case Experts(a=a, b=b):
            told = ("mixing", "score", "inputs", "weighting")
            settings = ", ".join(str(getattr(module, name)) for name in told)
            settings = f"top_k {module.top_k}, temperature {module.temperature}, {settings}"
            turned = ", turned to their prototypes" if module.leading else ""
            return f"routed experts ({a.shape} to {b.shape}, {settings}{turned})"
        case PerExample():
            raise InputError("a batch's slots cannot be combined; combine the adapters in them")
        case Saved(value=value):
            return f"a whole weight ({' x '.join(map(str, value.shape))})"
    raise TypeError(f"{type(module).__name__} is not a module")


def _layers(axes: tuple[int, ...]) -> str:
    return " x ".join(map(str, axes)) + " layers"


def common_scale(modules: Sequence[LoRA]) -> list[LoRA]:
    """The same deltas under one scale: theirs if they agree, or 1 with each folded into its `b`."""
    agree = len({module.scale for module in modules}) == 1
    return list(modules) if agree else [fold_scale(module) for module in modules]


def pad_rank(module: LoRA, rank: int) -> LoRA:
    """The same delta at a larger rank: zero columns after `a`'s, zero rows after `b`'s."""
    more = rank - module.a.shape[-1]
    if more < 0:
        raise InputError(f"a LoRA of rank {module.a.shape[-1]} cannot be padded to rank {rank}")
    if not more:
        return module
    lead = [(0, 0)] * (module.a.ndim - 2)
    a = jnp.pad(module.a, [*lead, (0, 0), (0, more)])
    b = jnp.pad(module.b, [*lead, (0, more), (0, 0)])
    return LoRA(a, b, module.scale, module.bias)


def common_rank(modules: Sequence[LoRA]) -> list[LoRA]:
    """The same deltas, all at the largest rank among them."""
    rank = max(module.a.shape[-1] for module in modules)
    return [pad_rank(module, rank) for module in modules]

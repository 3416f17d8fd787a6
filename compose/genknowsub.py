"""Modules with general knowledge taken out: GenKnowSub (arXiv 2505.10939)."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from compose import lowrank
from compose.align import by_projection
from compose.arithmetic import Space, Weight, average, factor_sum, weighted_sum
from compose.decompositions import significant, wide
from compose.library import Library
from compose.weights import over_layers
from lora_jax.errors import InputError
from lora_jax.modules import Adapter, LoRA, Module, Saved

Array = jax.Array


def genknowsub(
    tasks: Library, generals: Sequence[Adapter], *, space: Space, strength: Weight = 1.0
) -> Library:
    """The library with the mean of the general modules subtracted from each of its modules."""
    general = average(generals, space=space)
    return tasks.map(lambda task: without(task, general, space=space, strength=strength))


def without(task: Adapter, general: Adapter, *, space: Space, strength: Weight = 1.0) -> Adapter:
    """A task module less `strength` times a general one.

    In factor space both factors are subtracted, a - γa' and b - γb', as in the paper's code: what
    remains is ab - γab' - γa'b + γ²a'b', not ab - γa'b'. In delta space it is that, exactly.
    """
    if space == "delta":
        return weighted_sum([task, general], [1.0, -strength], space=space)
    alone = sorted(general.keys() - task.keys())
    if alone:
        # 0 - a' times 0 - b' would add the general module where the task has none.
        raise InputError(
            f"the general module changes {', '.join(alone)} and the task module does not; "
            f"subtract in delta space, or train both on the same projections"
        )
    return factor_sum([task, general], [1.0, -strength], sign="ab")


def centred(tasks: Library, *, space: Space, strength: Weight = 1.0) -> Library:
    """The library with its own mean subtracted from each module: the code's mean normalisation."""
    return genknowsub(tasks, tasks.adapters, space=space, strength=strength)


def project_out(
    task: Adapter, general: Adapter, *, space: Space, strength: Weight = 1.0
) -> Adapter:
    """A task module less `strength` times what lies in the general one's subspaces.

    The orthogonal projection of the paper's code: a - γPa and b - γbQ, where P projects on the
    inputs that the general module reads and Q on the outputs that it writes. In factor space those
    are the spans of its a and its b, each for itself; in delta space those of its delta, and a
    module that was never trained has none. Ranks stay; a projection without a general module, and
    weights kept whole, stay as they are.
    """
    by_projection([task, general])  # refuses modules that do not fit together
    return {
        path: _projected(path, module, general.get(path), space, strength)
        for path, module in task.items()
    }


def _projected(
    path: str, task: Module, general: Module | None, space: Space, strength: Weight
) -> Module:
    """One projection's module without what the general one spans."""
    match task, general:
        case (_, None) | (Saved(), _):
            return task
        case LoRA(bias=None), LoRA(bias=None):
            reads, writes = _spans(general, space)
            a, b = wide(task.a), wide(task.b)
            with jax.default_matmul_precision("highest"):
                a -= over_layers(strength, a) * (reads @ (reads.mT @ a))
                b -= over_layers(strength, b) * (b @ writes @ writes.mT)
            return replace(task, a=a.astype(task.a.dtype), b=b.astype(task.b.dtype))
    raise InputError(f"{path}: only LoRA without a bias has subspaces to project on")


def _spans(module: LoRA, space: Space) -> tuple[Array, Array]:
    """Orthonormal inputs (..., I, R) and outputs (..., O, R); columns without strength are zero."""
    if space == "delta":
        u, s, vt = lowrank.svd(module)
        there = significant(s, module.a.shape[-1])[..., None, :]
        return u * there, vt.mT * there
    return _span(module.a), _span(module.b.mT)


def _span(x: Array) -> Array:
    """An orthonormal basis (..., I, R) of the columns of x (..., I, R)."""
    rank = x.shape[-1]
    u, s, _ = lowrank.svd(LoRA(x, jnp.broadcast_to(jnp.eye(rank), (*x.shape[:-2], rank, rank))))
    return u * significant(s, rank)[..., None, :]

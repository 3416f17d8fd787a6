"""Modules with general knowledge taken out: GenKnowSub (arXiv 2505.10939)."""

from collections.abc import Sequence

from compose.arithmetic import Space, Weight, average, factor_sum, weighted_sum
from compose.library import Library
from lora_jax.errors import InputError
from lora_jax.modules import Adapter


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

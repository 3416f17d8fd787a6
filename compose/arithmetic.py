"""Addition, averages, negation, analogy and detoxification of modules, in two spaces.

Zhang et al., "Composing Parameter-Efficient Modules with Arithmetic Operations" (PEM). A missing
projection is the zero module, and an empty adapter is zero everywhere. IA3 is stored as an offset
from one, so its sums are sums of offsets, in either space alike. So are those of weights that
modules keep whole, such as a classifier's head: what counts is how far each is from the base's, so
that weights that add up to one average them, and any others leave the base's a share. A weight is
one number, one a layer, or either by projection (`compose.weights`), and may be traced.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from compose.align import by_projection, common_rank, common_scale
from compose.lowrank import concat
from compose.weights import Mixing, Weight, Weights, at, refuse_lost, shares, times
from lora_jax.errors import InputError
from lora_jax.modules import IA3, Adapter, DoRA, LoRA, Module, Saved

Space = Literal["delta", "factor"]


def weighted_sum(adapters: Sequence[Adapter], weights: Weights, *, space: Space) -> Adapter:
    """Σ wᵢ mᵢ in the named space; see `delta_sum` and `factor_sum`."""
    match space:
        case "delta":
            return delta_sum(adapters, weights)
        case "factor":
            return factor_sum(adapters, weights)
    raise InputError(f"unknown space {space!r}; choose delta or factor")


def delta_sum(adapters: Sequence[Adapter], weights: Weights) -> Adapter:
    """The adapter whose delta is Σ wᵢ sᵢ aᵢbᵢ, exactly; ranks add up, weights go into b."""

    def add(modules: list[LoRA], weights: list[Weight]) -> LoRA:
        """One projection's sum, by putting ranks side by side."""
        pairs = zip(modules, weights, strict=True)
        return concat([LoRA(m.a, times(w, m.b), m.scale) for m, w in pairs])

    return _sum(adapters, weights, add)


def factor_sum(
    adapters: Sequence[Adapter], weights: Weights, *, sign: Literal["a", "b", "ab"] = "b"
) -> Adapter:
    """The papers' sum, tensor by tensor: a = Σ wᵢaᵢ and b = Σ wᵢbᵢ, cross terms included.

    `sign` says which factor bears a negative weight's sign, the other being weighed by |w|: "b" as
    in PEM's negation, "a" as in its Alpaca-LoRA experiment, "ab" as in GenKnowSub and LoRAHub,
    where a lone negated module is itself again. So 0.5·m has a quarter of m's delta, and -0.5·m
    minus a quarter (PEM) or plus a quarter ("ab"). Unequal scales are first folded into b.
    """

    def add(modules: list[LoRA], weights: list[Weight]) -> LoRA:
        """One projection's sum, factor by factor."""
        modules = common_rank(common_scale(modules))
        sizes = [abs(w) for w in weights]
        a = _total(weights if "a" in sign else sizes, [module.a for module in modules])
        b = _total(weights if "b" in sign else sizes, [module.b for module in modules])
        return LoRA(a, b, modules[0].scale)

    return _sum(adapters, weights, add)


Add = Callable[[list[LoRA], list[Weight]], LoRA]


def _sum(adapters: Sequence[Adapter], weights: Weights, add: Add) -> Adapter:
    """A weighted sum, projection by projection; `add` joins the LoRA modules of one."""
    if len(adapters) != len(weights):
        raise InputError(f"{len(adapters)} modules need as many weights; got {len(weights)}")
    for path, module in (pair for adapter in adapters for pair in adapter.items()):
        refuse_sum(path, module)
    table, result = by_projection(adapters), {}
    refuse_lost(weights, table)
    for path, modules in table.items():
        pairs = zip(modules, weights, strict=True)
        present = [(m, at(w, path)) for m, w in pairs if m is not None]
        result[path] = _add(path, [m for m, _ in present], [w for _, w in present], add)
    return result


def refuse_sum(path: str, module: Module) -> None:
    """Refuses what no sum of LoRA modules can hold."""
    if isinstance(module, DoRA):
        raise InputError(
            f"{path}: what a DoRA adds depends on the base's columns and has no low-rank form; "
            f"merge it into the base (--merged), or combine plain LoRA"
        )
    if isinstance(module, LoRA) and module.bias is not None:
        raise InputError(f"{path}: a LoRA with a lora_bias cannot be combined; merge it (--merged)")


def _add(path: str, modules: list[Module], weights: list[Weight], add: Add) -> Module:
    """One projection's sum; `by_projection` has seen to it that the modules are of one kind."""
    if loras := [module for module in modules if isinstance(module, LoRA)]:
        return add(loras, weights)
    if scalings := [module for module in modules if isinstance(module, IA3)]:
        return IA3(_total(weights, [module.offset for module in scalings]), scalings[0].on)
    if whole := [module for module in modules if isinstance(module, Saved)]:
        return _whole(whole, weights)
    raise InputError(f"{path}: routed experts cannot be summed; combine the library's modules")


def _whole(modules: list[Saved], weights: list[Weight]) -> Saved:
    """The sum of whole weights; a share that is known to be 1, up to rounding, is left unsaid."""
    if any(jnp.ndim(w) for w in weights):
        raise InputError("weights that a module keeps whole take one number, not one a layer")
    value = _total(weights, [module.value for module in modules])
    share = _total(weights, [jnp.ones(()) if m.share is None else m.share for m in modules])
    known = not isinstance(share, jax.core.Tracer)
    return Saved(value) if known and np.allclose(share, 1, atol=1e-6) else Saved(value, share)


def _total(weights: list[Weight], tensors: list[jax.Array]) -> jax.Array:
    """Σ wᵢ xᵢ, each term in its tensor's own type, so that one tensor at weight 1 is itself."""
    first, *rest = map(times, weights, tensors)
    return sum(rest, first)


def average(
    adapters: Sequence[Adapter], weights: Weights | None = None, *, space: Space
) -> Adapter:
    """The sum with weights divided by their total, as in PEM; all alike by default."""
    if not len(adapters):
        raise InputError("the average of no modules is undefined; give at least one")
    weights = [1.0] * len(adapters) if weights is None else weights
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    return weighted_sum(adapters, shares(weights, paths), space=space)


def scale(adapter: Adapter, weight: Mixing, *, space: Space) -> Adapter:
    """w·m in the named space: a delta w times as large, or |w|·a and w·b (a delta of w|w|)."""
    return weighted_sum([adapter], [weight], space=space)


def negate(adapter: Adapter, strength: Weight = 1.0) -> Adapter:
    """-λ times the module's delta, in either space: b becomes -λb; IA3's l becomes 1 - λ(l - 1).

    PEM's negation and its scaled unlearning. Negating both factors would change nothing.
    """
    return delta_sum([adapter], [-strength])


def subtract(x: Adapter, y: Adapter, *, space: Space) -> Adapter:
    """x ⊖ y; in factor space that is PEM's x ⊕ (⊖y): the a's are added and only b is subtracted."""
    return weighted_sum([x, y], [1.0, -1.0], space=space)


def analogy(
    task: Adapter, target: Adapter, source: Adapter, weight: Weight, *, space: Space
) -> Adapter:
    """PEM's domain transfer: λ·task ⊕ (1-λ)·(target ⊖ source).

    `task` was trained on the source domain; `target` and `source` model each domain's language.
    In factor space a = λa₁ + (1-λ)a₂ + (1-λ)a₃ and b = λb₁ + (1-λ)b₂ - (1-λ)b₃.
    """
    return weighted_sum([task, target, source], [weight, 1 - weight, weight - 1], space=space)


def detox(instructed: Adapter, toxic: Adapter, strength: Weight, *, space: Space) -> Adapter:
    """PEM's Alpaca-LoRA formula: θ ⊕ c·(θ ⊖ toxic), toxic trained on from θ.

    In factor space it is a that bears the minus: a + c(a - a'), b + c(b + b').
    """
    adapters, weights = [instructed, toxic], [1 + strength, -strength]
    if space == "factor":
        return factor_sum(adapters, weights, sign="a")
    return weighted_sum(adapters, weights, space=space)

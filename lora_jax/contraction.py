"""A layer's kernel of any number of axes as the matrix (in, out) that a module changes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import InputError, refuse_all
from lora_jax.merge import changed_by
from lora_jax.modules import IA3, Adapter, DoRA, Experts, Module, PerExample, Saved
from lora_jax.project import changed


@dataclass(frozen=True)
class Contraction:
    """Which axes of a layer's input and kernel meet, and where the kernel's others come out.

    Axes of the input and of the output may count from the end and are taken in their own order;
    `ins` and `outs` are the kernel's axes in that order.
    """

    met: tuple[int, ...]  # axes of the input
    ins: tuple[int, ...]  # the kernel's axes that they meet
    outs: tuple[int, ...]  # the kernel's other axes
    given: tuple[int, ...]  # axes of the output that these become

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """The kernel as (..., I, O), any axes that layers are stacked along in front."""
        return kernel.transpose(self._order(kernel.ndim)).reshape(self.shape(kernel.shape))

    def shape(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """The (..., I, O) of a kernel's shape."""
        order = self._order(len(kernel))
        outs = len(order) - len(self.outs)
        ins = outs - len(self.ins)
        sizes = [kernel[axis] for axis in order]
        return (*sizes[:ins], math.prod(sizes[ins:outs]), math.prod(sizes[outs:]))

    def _order(self, ndim: int) -> list[int]:
        """A kernel's axes: those that layers are stacked along, those met, and the others."""
        lead = ndim - len(self.ins + self.outs)
        return [*range(lead), *(lead + axis for axis in self.ins + self.outs)]

    def changed(
        self,
        plain: Callable[[Any], Any],
        x: jax.Array,
        kernel: jax.Array,
        path: str,
        module: Module,
    ) -> jax.Array:
        """What `plain`, a layer of this contraction, gives for x under its module."""
        refuse_misfits({path: module}, {path: self.shape(kernel.shape)})
        ins, outs = ([kernel.shape[axis] for axis in axes] for axes in (self.ins, self.outs))

        def flat(x: jax.Array) -> jax.Array:
            return _gathered(plain(_spread(x, ins, self.met)), self.given)

        y = changed(flat, _gathered(x, self.met), self.matrix(kernel), module)
        return _spread(y, outs, self.given)

    def merged(
        self, path: str, module: Module, kernel: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """A kernel and bias, shaped as they are, after a module is put in."""
        shape, order = self.shape(kernel.shape), self._order(kernel.ndim)
        flat = None if bias is None else bias.reshape(*shape[:-2], -1)
        new, flat = changed_by(path, module, self.matrix(kernel), flat)
        new = new.reshape([kernel.shape[axis] for axis in order]).transpose(np.argsort(order))
        if flat is None:
            return new, None
        if bias is None:
            raise InputError(f"{path}: its lora_bias has no bias in the layer to merge into")
        return new, flat.reshape(bias.shape)


def _gathered(x: jax.Array, axes: Iterable[int]) -> jax.Array:
    """x with these axes, in their order, as one last axis."""
    places = sorted(axis % x.ndim for axis in axes)
    x = jnp.moveaxis(x, places, range(-len(places), 0))
    return x.reshape(*x.shape[: x.ndim - len(places)], -1)


def _spread(x: jax.Array, sizes: Sequence[int], axes: Iterable[int]) -> jax.Array:
    """The inverse of `_gathered`: x's last axis of these sizes again, each in its place."""
    x = x.reshape(*x.shape[:-1], *sizes)
    places = sorted(axis % x.ndim for axis in axes)
    return jnp.moveaxis(x, range(-len(places), 0), places)


def along(axes: Iterable[int], features: int = 1) -> Contraction:
    """The contraction of an input's `axes` with a kernel's first, as its last so many are left."""
    met = tuple(axes)
    ins, outs = range(len(met)), range(len(met), len(met) + features)
    return Contraction(met, tuple(ins), tuple(outs), tuple(range(-features, 0)))


def einsum(equation: str) -> Contraction | None:
    """The contraction of an einsum of an input and a kernel; None where it is not a plain one.

    It is plain if each of the kernel's letters is either summed or given out, and all else of the
    input comes out as it went in: "btd,dhk->bthk", "...hk,hkd->...d".
    """
    operands, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    x, _, kernel = operands.partition(",")
    ins = [letter for letter in x if letter in kernel and letter not in result]
    outs = [letter for letter in result if letter in kernel and letter not in x]
    rest = [letter for letter in x if letter not in ins]
    split = "." not in kernel and sorted(kernel) == sorted(ins + outs)
    kept = rest == [c for c in result if c not in outs] and len(set(rest)) == len(rest)
    if not (ins and outs and split and kept):
        return None
    return Contraction(
        tuple(_place(letter, x) for letter in ins),
        tuple(map(kernel.index, ins)),
        tuple(map(kernel.index, outs)),
        tuple(_place(letter, result) for letter in outs),
    )


def _place(letter: str, operand: str) -> int:
    """The axis of a letter; behind an ellipsis it counts from the end."""
    at, dots = operand.index(letter), operand.find(".")
    return at - len(operand) if 0 <= dots < at else at


def refuse_misfits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuses modules at no projection of a model, or of other sizes than it has there.

    `shapes` are the model's (..., I, O) by path, None where they are not known yet.
    """
    problems = []
    for path, module in adapter.items():
        if isinstance(module, Saved):
            problems.append(f"{path} is kept whole; put its value into the model's own weights")
        elif path not in shapes:
            problems.append(f"no projection {path!r} for a module; it has {', '.join(shapes)}")
        elif (shape := shapes[path]) is not None and not _fits(module, shape):
            held = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(module))
            problems.append(f"{path} is {shape}, and its {type(module).__name__} holds {held}")
    refuse_all(problems, "this model has no place for the adapter")


def _fits(module: Any, shape: tuple[int, ...]) -> bool:
    """Whether a module is one of a kernel (..., I, O)."""
    *lead, size, out = shape
    if isinstance(module, PerExample):
        slots = jax.tree.leaves(module.parts)[0].shape[len(lead)]
        return all(_fits(part, (*lead, slots, size, out)) for part in module.parts)
    if isinstance(module, IA3):
        return module.offset.shape == (*lead, size if module.on == "input" else out)
    if isinstance(module, Experts):
        lead = [*lead, module.a.shape[-3]]
    rank = module.a.shape[-1]
    row = module.magnitude if isinstance(module, DoRA) else getattr(module, "bias", None)
    if row is not None and row.shape != (*lead, out):
        return False
    return module.a.shape == (*lead, size, rank) and module.b.shape == (*lead, rank, out)

"""Weight tables: a family declares each weight once, and the rest is maps over that table.

An entry says which axes a weight has here, its shape, and what a checkpoint calls it. Loading,
saving, initialisation and shardings all read the same table.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclass(frozen=True)
class Leaf:
    """One weight of a base model; a "{n}" in `name` stands for the layer, the first axis here."""

    axes: str  # a letter an axis, of the legend
    shape: tuple[int, ...]
    name: str
    transposed: bool = False  # a checkpoint stores (out, in), we hold (in, out)
    norm: bool = False  # a norm's gain: one at initialisation
    instead: str = ""  # what is taken for it where a checkpoint does not store it apart
    new: float | None = None  # of a task's head, which a checkpoint may lack: its deviation then

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return "{n}" in self.name

    def names(self) -> list[str]:
        """What a checkpoint calls this weight: one name, or one a layer."""
        if not self.stacked:
            return [self.name]
        return [self.name.replace("{n}", str(n)) for n in range(self.shape[0])]

    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each stored tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a module's own weight of this shape, as stored, can take this one's place.

        How many labels there are is its own affair.
        """
        axes, wanted = self.axes.removeprefix("N"), self.stored_shape()
        letters = axes[::-1] if self.transposed else axes
        return len(shape) == len(wanted) and all(
            letter == "L" or one == other
            for letter, one, other in zip(letters, shape, wanted, strict=True)
        )


Table = Mapping[str, Leaf]  # keyed "embed", "layers.self_attn.q_proj": the path in the weights

# Stacks of layers. Modules in "layers" are known by their path in a layer ("self_attn.q_proj"),
# others by their whole path ("encoder.SelfAttention.q").
STACKS = ("layers", "encoder", "decoder")

# Which mesh axis each weight axis is cut along. A layer is never cut: the scan walks it.
MESH_AXES = {"D": "fsdp", "H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}


def biased(key: str, leaf: Leaf) -> dict[str, Leaf]:
    """A kernel or a norm's gain under its key, and the bias that is stored beside it."""
    lead = int(leaf.stacked)
    axes, shape = leaf.axes[:lead] + leaf.axes[-1], (*leaf.shape[:lead], leaf.shape[-1])
    bias = Leaf(axes, shape, leaf.name.removesuffix("weight") + "bias", new=leaf.new)
    return {key: leaf, f"{key}.bias": bias}


def module_path(key: str) -> str:
    """What an adapter calls the weight at `key`."""
    return key.removeprefix("layers.")


def is_projection(leaf: Leaf) -> bool:
    """Whether a weight is a kernel that every layer has: what a module can change."""
    return leaf.stacked and len(leaf.shape) == 3


def kernels(table: Table) -> dict[str, Leaf]:
    """The projections that every layer has, by module path."""
    return {module_path(key): leaf for key, leaf in table.items() if is_projection(leaf)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The weights' tree: top-level weights by name, and each stack's in one dict of paths."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        stack, _, name = key.partition(".")
        if stack in STACKS:
            tree.setdefault(stack, {})[name] = value
        else:
            tree[key] = value
    return tree


def flatten(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`."""
    return traverse_util.flatten_dict(dict(weights), sep=".")


def init(key: jax.Array, table: Table, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights of the table's shapes: for tests and benchmarks, not for training a model."""

    def one(index: int, leaf: Leaf) -> jax.Array:
        if leaf.norm:
            return jnp.ones(leaf.shape, dtype)
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 and leaf.axes != "VD" else leaf.shape[-1]
        draw = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, jnp.float32)
        return (draw / np.sqrt(fan_in)).astype(dtype)

    return nest({path: one(i, leaf) for i, (path, leaf) in enumerate(table.items())})


def new_weight(path: str, leaf: Leaf) -> np.ndarray:
    """The weight of a new head: always the same, so that every run sees one base model.

    Kernels are drawn with the leaf's deviation, vectors are zero, as in transformers.
    """
    if leaf.new is None or len(leaf.shape) == 1:
        return np.zeros(leaf.shape, np.float32)
    random = np.random.default_rng(zlib.crc32(path.encode()))
    return leaf.new * random.standard_normal(leaf.shape, np.float32)


def abstract(table: Table, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The weights' shapes without the weights."""
    return nest({path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in table.items()})


def shardings(table: Table, mesh: Mesh) -> dict[str, Any]:
    """How each weight lies on a mesh: cut along `MESH_AXES`, whole where the cut is uneven."""

    def one(leaf: Leaf) -> NamedSharding:
        cuts: list[str | None] = []
        for letter, size in zip(leaf.axes, leaf.shape, strict=True):
            axis = None if leaf.norm else MESH_AXES.get(letter)
            fits = axis is not None and axis not in cuts and size % mesh.shape[axis] == 0
            cuts.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*cuts))

    return nest({path: one(leaf) for path, leaf in table.items()})

"""One mesh with the named axes data, fsdp and tensor, and how arrays lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over this job's devices; -1 for one axis takes what the others leave.

    Batches are cut along data and fsdp, weights along fsdp and tensor (`table.MESH_AXES`).
    """
    sizes, devices = [data, fsdp, tensor], jax.devices()
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    total = int(np.prod(sizes))
    if min(sizes) < 1 or total > len(devices):
        raise InputError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit "
            f"{len(devices)} device{'s' * (len(devices) > 1)}"
        )
    return Mesh(np.asarray(devices[:total]).reshape(sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_multiple(mesh: Mesh | None) -> int:
    """The number that a batch's rows must be a multiple of."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """A batch on the devices, its rows (at `axis`) spread over the mesh.

    Every host holds the whole batch and gives its own devices their share.
    """
    if mesh is None:
        return jax.tree.map(jax.device_put, batch)
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp")))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)

"""Where arrays live: a mesh of (data, fsdp, tensor), a table of patterns for parameters, and rows over data and fsdp."""

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))

# First match wins. Stacked layers lead with a layer axis that stays whole; matrices are [layers, in, out].
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(^|/)embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(^|/)unembedding$", PartitionSpec("fsdp", "tensor")),
    (r"/(query|key|value|gate|up)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"/(output|down)$", PartitionSpec(None, "tensor", "fsdp")),
    (r"/(query|key|value)_bias$", PartitionSpec(None, "tensor")),
    (r"", PartitionSpec()),
)


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices; ``data=-1`` takes what fsdp and tensor leave.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or not (data == -1 or data >= 1):
        raise ValueError(f"mesh sizes must be at least 1 (data may be -1), got {data=}, {fsdp=}, {tensor=}")
    data = len(devices) // (fsdp * tensor) if data == -1 else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data={data} · fsdp={fsdp} · tensor={tensor} is not the number of devices, {len(devices)}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of parameters, or of any tree that repeats their paths (gradients, Adam moments).

    A dimension that its mesh axis does not divide is left whole, so every shape has a sharding.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))
        spec = rule if len(rule) <= leaf.ndim else PartitionSpec()
        fits = (a if a is None or leaf.shape[d] % mesh.shape[a] == 0 else None for d, a in enumerate(spec))
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def sharded_shapes(tree: Any, mesh: Mesh) -> Any:
    """The same shapes and types with the sharding of each leaf, ``jax.ShapeDtypeStruct``: arrays that take no memory."""

    def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree, parameter_shardings(tree, mesh))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (prompts, and with them their groups) spread over the data and fsdp axes."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh, rows: int = 0) -> int:
    """In how many equal parts rows are spread; 1 where so many ``rows`` do not divide, which are then not spread."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if rows % shards else shards


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())

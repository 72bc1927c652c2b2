"""Where arrays live: a mesh of (data, fsdp, tensor), a table of patterns for parameters, and rows over data and fsdp."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.rollout import PromptBatch, Rollout

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

    TPUs of several slices, between which transfers are slow, are spread along data, so that fsdp and tensor stay within one.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or data that is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or not (data == -1 or data >= 1):
        raise ValueError(f"mesh sizes must be at least 1 (data may be -1), got {data=}, {fsdp=}, {tensor=}")
    data = len(devices) // (fsdp * tensor) if data == -1 else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data={data} · fsdp={fsdp} · tensor={tensor} is not the number of devices, {len(devices)}"
        )
    types = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices, axis_types=types)
    if data % slices:
        raise ValueError(f"mesh data={data} is not a multiple of the {slices} slices, along which data is spread")
    grid = create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=types)


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


def row_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Rows (prompts, and with them their groups) spread over data and fsdp, where ``rows`` is a multiple of data · fsdp."""
    divides = rows is None or rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, ROWS) if divides else replicated(mesh)


def row_shards(mesh: Mesh, rows: int | None = None) -> int:
    """In how many equal parts rows are spread; 1 where ``rows`` is no multiple of data · fsdp: they are then not spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"] if row_sharding(mesh, rows).spec == ROWS else 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rollout_shardings(rows: Any, whole: Any) -> Any:
    """Where the arrays of a rollout lie: spread by rows, except for the scalar ``useful``."""
    return Rollout(*(whole if field == "useful" else rows for field in Rollout._fields))


def gather_layer(shapes: Any) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """A function that gathers what fsdp spreads of the parameters of a layer, each device in its own program (`jax.shard_map`).

    Args:
      shapes: of the parameters, with shardings.
    """
    specs = {name: leaf.sharding.spec for name, leaf in shapes["layers"].items()}
    axes = {name: spec.index("fsdp") - 1 for name, spec in specs.items() if "fsdp" in spec}  # of a layer alone

    def gather(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: jax.lax.all_gather(x, "fsdp", axis=axes[name], tiled=True) if name in axes else x
            for name, x in weights.items()
        }

    return gather


def spread_sampling(
    sample: Callable[..., Rollout], mesh: Mesh, dtype: str, *, gather: str = "model"
) -> Callable[..., Rollout]:
    """``sample`` with the prompts' rows spread over data and fsdp, where their number allows it; else each has all of them.

    Every device decodes its own rows, and stops when they have ended; only a tensor axis is left to XLA. Its transfers may wait
    for all devices, so that with it all make their steps together, until the last row has ended. What fsdp spreads is gathered
    once, before the first token, in the type that the matrix products cast it to anyway; or, where the whole model is too large
    for a device, each layer of it when it is its turn, at every token.

    Args:
      sample: (params, prompts, key, first_sample=0, **options) -> `Rollout`; with the option ``vmap_axis`` of `sample_groups`.
      mesh: the devices, over which the parameters are spread as `parameter_shardings` says.
      dtype: of matrix products.
      gather: "model" or "layer"; with "layer", ``sample`` has a policy that gathers its layers, see `gather_layer`.
    """
    by_layer = gather == "layer" and mesh.shape["fsdp"] > 1
    together, axes = ({"vmap_axis": ROWS[0]}, ROWS[0]) if mesh.shape["tensor"] > 1 else ({}, mesh.axis_names)
    if by_layer:
        together = {"vmap_axis": ROWS[0]}

    def cast(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        return leaf.astype(dtype) if "fsdp" in sharding.spec else leaf

    def spread(params: Any, prompts: PromptBatch, key: jax.Array, first_sample: Any = 0, **options: Any) -> Rollout:
        shards = row_shards(mesh, prompts.tokens.shape[0])
        if mesh.size == 1:
            return sample(params, prompts, key, first_sample=first_sample, **options)

        def of_device(params: Any, prompts: PromptBatch, key: jax.Array, first_sample: jax.Array) -> Rollout:
            rollout = sample(params, prompts, key, first_sample=first_sample, **together, **options)
            if shards == 1:
                return rollout
            # The share of useful work of all devices: tokens over row-steps, each summed.
            tokens = rollout.mask.sum(dtype=jnp.float32)
            tokens, work = jax.lax.psum((tokens, tokens / rollout.useful), ROWS[0])
            return rollout._replace(useful=tokens / work)

        whole, shardings = PartitionSpec(), parameter_shardings(params, mesh)
        weights = jax.tree.map(lambda _: whole, params)
        if by_layer:
            weights["layers"] = {
                name: PartitionSpec(*(axis if axis == "fsdp" else None for axis in sharding.spec))
                for name, sharding in shardings["layers"].items()
            }
        rows = whole if shards == 1 else ROWS
        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(weights, rows, whole, whole),
            out_specs=rollout_shardings(rows, whole),
            axis_names=set(axes),
            check_vma=False,
        )(jax.tree.map(cast, params, shardings), prompts, key, jnp.asarray(first_sample, jnp.int32))

    return spread

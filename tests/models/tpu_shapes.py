"""Compiles the kernel of decoding for TPUs that are not there, in shapes of all kinds: python -m tests.models.tpu_shapes v4:2x2x1

Needs the package libtpu, which one process at a time may use: so this is a command, which its test calls.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.tpu_attention import CachedLayer, attend_to_cache
from grpo_jax.runs.topologies import topology_devices

SHAPES = (  # rows, key heads, features, query heads, slots, type
    *((32, 1, 8, 8, 3, "float32"), (4, 1, 8, 2, 1, "float32"), (64, 2, 16, 4, 8, "float32")),
    *((1, 2, 64, 14, 100, "bfloat16"), (33, 3, 80, 6, 65, "bfloat16"), (8, 32, 128, 32, 256, "bfloat16")),
    *((1001, 8, 128, 32, 1000, "bfloat16"), (16, 1, 256, 8, 200, "bfloat16"), (16, 8, 96, 32, 200, "float32")),
    *((128, 4, 64, 28, 4096, "float32"), (7, 5, 64, 15, 64, "bfloat16"), (800, 2, 16, 4, 8, "float32")),
    *((6400, 2, 16, 4, 4, "float32"), (256, 3, 64, 9, 1024, "bfloat16"), (256, 1, 64, 7, 1024, "bfloat16")),
    *((512, 2, 64, 14, 16, "bfloat16"), (512, 2, 64, 14, 1024, "bfloat16")),
)


def attended(query: Any, *fields: Any) -> Any:
    """The kernel, with a soft cap."""
    return attend_to_cache(query, CachedLayer(*fields), 0.125, 2.0)


def main(topologies: list[str]) -> None:
    """Prints a line for each topology; whatever does not compile raises."""
    for name in topologies:
        here = jax.sharding.SingleDeviceSharding(topology_devices(name)[0])
        for B, K, H, N, S, dtype in SHAPES:
            cached = (B + 3, 2, K * H, S), dtype
            shapes = ((B, N, H), dtype), cached, cached, ((), "int32"), ((), "int32"), ((B, 1, 1, S), "bool")
            given = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=here) for shape, kind in shapes]
            jax.jit(attended).trace(*given).lower(lowering_platforms=("tpu",)).compile()
        print(f"{name}: {len(SHAPES)} shapes")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(sys.argv[1:])

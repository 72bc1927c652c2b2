"""Accelerators that are not there: their own compilers run on any machine, and say what a program needs on each device.

TPUs need the package libtpu of jax's version, an H200 jax's CUDA plugin; neither needs the device.
"""

import math
import os
import re
from collections import Counter
from typing import Any

import jax

from grpo_jax.manifests import parse_cluster

# Bytes per device that their compiler gives to programs, read from what it says of a program that is too large.
CAPACITY = {
    "TPU v4": 15.25 * 2**30,
    "TPU v5 lite": 15.75 * 2**30,
    "TPU v5": 95.73 * 2**30,
    "TPU v6 lite": 31.24 * 2**30,
    "NVIDIA H200": 0.75 * 139.0 * 2**30,  # what jax takes of it, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
}
H200_DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability { major: 9 }
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 149250000000
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 } device_description_str: "NVIDIA H200"
"""


def topology_devices(name: str) -> list[Any]:
    """The devices of a topology, to compile for.

    Args:
      name: see `parse_cluster`.

    Raises:
      ValueError: there is no such topology, or its compiler is not installed; says what to do.
    """
    from jax.experimental import topologies

    cluster = parse_cluster(name.lower())
    if cluster.is_tpu:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it looks for a server that only a pod has, for a while
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        arguments: Any = (f"{cluster.kind}:{cluster.grid}", "tpu")
        options: dict[str, Any] = {} if cluster.slices == 1 else {"num_slices": cluster.slices}
        package = "'jax[tpu]'"
    else:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which would look for a driver
        number = cluster.slices * cluster.hosts * cluster.chips
        arguments, options = ("", "cuda"), {"topology": f"1x{number}x1", "target_config": H200_DESCRIPTION}
        package = "'jax[cuda13]'"
    # Programs of devices that are not there can be stored, and not read again.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return list(topologies.get_topology_desc(*arguments, **options).devices)
    except Exception as error:  # whatever a compiler that is half there raises
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"--topology={name}: {reason}. Its compiler comes with pip install {package}") from error


def out_of_memory(error: Exception) -> int | None:
    """The bytes that a program would need, from the error of a compiler that found it too large; None for any other error.

    >>> out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (2.50G) exceeds …")) / 2**30
    2.5
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT])", str(error))
    if match is None:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = re.compile(r"[a-z]+(\d+)\w*\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """The collective operations of a compiled program: {name: (how many, bytes of their results)}, those of a loop once.

    >>> collectives("  %x.1 = f32[8,4]{1,0} all-reduce(%y), replica_groups={}")
    {'all-reduce': (1, 128)}
    """
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for line in hlo.splitlines():
        if match := _COLLECTIVE.search(line):
            arrays = _ARRAY.findall(match[1])
            # What starts an operation holds its operand and its result.
            last = arrays[-1:] if "-start(" in line else arrays
            number[match[2]] += 1
            for bits, dimensions in last:
                entries = math.prod(int(d) for d in dimensions.split(",") if d)
                size[match[2]] += entries * int(bits) // 8
    return {name: (number[name], size[name]) for name in sorted(number)}

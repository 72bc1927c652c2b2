"""What sampling and an update should take on a card that is not there: programs compiled for it, or here, for shapes alone.

Beside the limits counted by hand stand XLA's count of memory and the bytes that the compiled loops move. With
``pip install jax[cuda13]`` XLA compiles for the H200 described below without having one; kernels that are chosen by timing them
are then chosen by rules.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax

from experiments.benchmarks import programs
from experiments.benchmarks.limits import (
    Device,
    Work,
    decode_steps,
    held_bytes,
    rollout_bytes,
    rollout_seconds,
    update_flops,
)
from experiments.benchmarks.programs import Setting
from experiments.benchmarks.traffic import Loop, loops
from grpo_jax.runs.topologies import topology_devices

GOALS = {"sampling": 0.7, "update": 0.5}  # of the limit


def target(name: str) -> Any:
    """The device to compile for: here, or H200, which need not be there.

    Raises:
      RuntimeError: jax has no plugin for it.
    """
    if name == "here":
        return jax.devices()[0]
    try:
        return topology_devices("h200:1")[0]
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def predict(work: str, setting: Setting, limits: Device, device: Any) -> tuple[dict[str, Any], list[Loop]]:
    """What to expect of a work on a device of these limits, and the loops of the program compiled for ``device``."""
    config, work_load = programs.decoder(setting), setting.work
    if work == "sampling":
        seconds, kept_bytes = rollout_seconds(config, work_load, limits), rollout_bytes(config, work_load)
    else:
        seconds, kept_bytes = update_flops(config, work_load) / limits.flops, held_bytes(config)
    function, shapes = programs.build(work, setting)
    placed = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes)
    start = time.perf_counter()
    compiled = function.trace(*shapes).lower(lowering_platforms=(_platform(device),)).compile()
    compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    program, *inside = loops(compiled.as_text())
    inside.sort(key=lambda loop: -loop.moved)
    largest = inside[0].moved if inside else 0
    passes = setting.completion - 1 if work == "sampling" else programs.blocks(setting)
    row = {
        "work": work,
        "setting": setting._asdict(),
        "limit_seconds": seconds,
        "goal_seconds": seconds / GOALS[work],
        "tokens": work_load.tokens,
        "held": kept_bytes,
        "xla_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "compile_seconds": compile_seconds,
        "moved": largest,
        "as_compiled": (program.moved + passes * largest) / limits.bandwidth,
        "needed": float(decode_steps(config, Work(work_load.lengths * 0 + setting.completion, setting.prompt))[0][-1]),
    }
    row["xla_bytes"] -= memory.alias_size_in_bytes
    return row, [program, *inside]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `predict` as Markdown.

    A pass is one of the largest loop: a decode step, or a micro-batch. "Needed" is what a decode step of all rows at full length
    has to read, and "as compiled" the time of all bytes if every pass were of that loop.

    >>> print(table([])[:30])
    | model | rows | work | length
    """
    head = [
        "model",
        "rows",
        "work",
        "lengths",
        "tokens/s at the limit",
        "at the goal",
        "s at the goal",
        "GiB needed",
        "XLA",
    ]
    head += ["GB a pass", "needed", "s as compiled", "compile s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        setting = row["setting"]
        cells = [setting["size"], str(setting["rows"]), row["work"], "ragged" if setting["ragged"] else "fixed"]
        cells += [f"{row['tokens'] / row[f'{x}_seconds']:,.0f}" for x in ("limit", "goal")]
        cells += [f"{row['goal_seconds']:.3g}", f"{row['held'] / 2**30:.1f}", f"{row['xla_bytes'] / 2**30:.1f}"]
        cells += [f"{row['moved'] / 1e9:.2f}", f"{row['needed'] / 1e9:.2f}" if row["work"] == "sampling" else "–"]
        cells += [f"{row['as_compiled']:.3g}", f"{row['compile_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe(loops: list[Loop], limits: Device, most: int = 8) -> Iterator[str]:
    """Lines on the program and its largest loops: bytes of a pass, their least time, and what moves most."""
    for loop in loops[:3]:
        yield f"  {loop.name}: {loop.moved / 1e9:.2f} GB a pass, {1e3 * loop.moved / limits.bandwidth:.2f} ms"
        for name, moved in loop.movers[:most]:
            yield f"    {moved / 1e9:8.3f} GB  {name}"


def _platform(device: Any) -> str:
    """As lowering names it, which knows CUDA and ROCm apart."""
    return "cuda" if device.platform == "gpu" and "NVIDIA" in device.device_kind else device.platform

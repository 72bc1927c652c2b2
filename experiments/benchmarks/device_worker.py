"""This project's sampling and update on an accelerator, and what the accelerator can do at best, as a worker of `race`.

A request holds ``work`` (limits, or one of `programs.WORKS`), a `programs.Setting` and ``trace``: a folder, or null.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import operations, programs
from experiments.benchmarks.programs import Setting
from experiments.benchmarks.worker import Prepared, serve

BYTES, SIDE, PASSES = 2**30, 8192, 32  # of the copy, of the matrices, and how often they are used in one program
SMALL = (2**22, 256, 4)  # the same on a CPU, which is only a rehearsal


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    device = jax.devices()[0]
    ready = {"versions": {"jax": jax.__version__}, "check": [], "device": device.device_kind}
    if request["work"] == "limits":
        sizes = SMALL if device.platform == "cpu" else (BYTES, SIDE, PASSES)
        return ready | {"memory": _memory("bytes_limit")}, lambda: measure_limits(*sizes)
    setting = Setting(**{name: request[name] for name in Setting._fields})
    function, shapes = programs.build(request["work"], setting)
    ready["compile_cold"] = _compile(function, shapes)[1]
    jax.clear_caches()  # and now from the disk
    program, ready["compile_cached"] = _compile(function, shapes)
    repeat = _repetition(request["work"], setting, program)
    if request["trace"]:
        repeat()
        with jax.profiler.trace(request["trace"]):
            repeat()
        ready["operations"] = operations.operations(Path(request["trace"]))[:60]
    return ready, repeat


def measure_limits(size: int, side: int, passes: int) -> dict[str, float]:
    """{"bandwidth": bytes per second of x + 1 on ``size`` bytes, "flops": operations per second of bfloat16 products}.

    Either is done ``passes`` times in one program, so that starting it does not count.
    """
    x, a = jnp.zeros(size // 4, jnp.float32), jnp.full((side, side), 1 / side, jnp.bfloat16)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1.0, x), donate_argnums=0)
    multiply = jax.jit(lambda a, b: jax.lax.fori_loop(0, passes, lambda _, b: a @ b, b))
    x, b = jax.block_until_ready((copy(x), multiply(a, a)))
    start = time.perf_counter()
    jax.block_until_ready(copy(x))
    copied = time.perf_counter()
    jax.block_until_ready(multiply(a, b))
    multiplied = time.perf_counter()
    bandwidth, flops = 2 * size * passes / (copied - start), 2 * side**3 * passes / (multiplied - copied)
    return {"bandwidth": bandwidth, "flops": flops}


def _repetition(work: str, setting: Setting, program: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
    arguments = list(programs.arrays(work, setting))
    jax.block_until_ready(arguments)

    def repeat() -> dict[str, Any]:
        start = time.perf_counter()
        outputs = jax.block_until_ready(program(*arguments))
        answer: dict[str, Any] = {"inside": time.perf_counter() - start, "peak": _memory("peak_bytes_in_use")}
        if work == "sampling":
            answer["lengths"] = np.array(outputs.mask.sum(-1)).tolist()
            answer["useful"] = float(outputs.useful) if "useful" in outputs._fields else None
            return answer
        arguments[0] = outputs[0]  # the state, which was donated
        answer["lengths"] = setting.work.lengths.tolist()
        return answer

    return repeat


def _compile(function: Any, shapes: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function.lower(*shapes).compile(), time.perf_counter() - start


def _memory(name: str) -> int | None:
    """What the device says of its memory, in bytes; CPUs say nothing."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


if __name__ == "__main__":
    serve(prepare)

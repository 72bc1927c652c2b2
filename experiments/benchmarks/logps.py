"""Time and memory of log-probabilities: ours beside the plain forms and beside chunks under jax.checkpoint.

python -m experiments.benchmarks.logps [--vocabularies=32000,151936] [--width=256] [--dtype=float32] [--out=runs/benchmarks]

Every form lives in a process of its own, compiled and warm; the processes take turns, one call each, so that what else the
machine does falls on all alike and only one of them holds logits at a time. A form that does not fit into the free memory is
reported with what XLA would allocate, and not run.
"""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from grpo_jax.objective import completion_logps

PHASES = ("forward", "forward+backward")
SPARE = 3.0  # GiB that must stay free beside what a program allocates: the machine may have other work


class Case(NamedTuple):
    """One setting, in which all forms are compared: sizes, as in the dimension key of grpo_jax, and what is asked for."""

    batch: int
    length: int
    width: int
    vocabulary: int
    dtype: str
    chunk_size: int | None
    entropy: bool


def compare(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Medians and spread of ``repeats`` rounds, and memory, of every form: one row per form and phase."""
    rows = {(form, phase): {"form": form, "phase": phase, "case": case._asdict()} for form in FORMS for phase in PHASES}
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for form in FORMS:
        pipes[form], other = context.Pipe()
        processes.append(context.Process(target=_serve, args=(other, form, case), daemon=True))
        processes[-1].start()
        other.close()
        for phase in PHASES:  # each compiles and makes its first calls alone
            rows[form, phase] |= _ask(pipes[form], phase)
    times: dict[tuple[str, str], list[Any]] = {key: [] for key, row in rows.items() if "refused" not in row}
    for _ in range(repeats):
        for form, phase in times:
            times[form, phase].append(_ask(pipes[form], phase))
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.close()
        process.join(10)
    for key, measured in times.items():
        for name in ("ms", "cpu_ms"):
            values = [m[name] for m in measured]
            rows[key] |= {name: {"median": statistics.median(values), "low": min(values), "high": max(values)}}
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `compare` as Markdown; the first form is what the others are compared with.

    >>> print(table([]), end="")
    | form | phase | ms (spread) | CPU ms | time / plain | peak MiB | XLA's temporaries, MiB | plain's / these |
    |---|---|---|---|---|---|---|---|
    """
    lines = [
        "| form | phase | ms (spread) | CPU ms | time / plain | peak MiB | XLA's temporaries, MiB | plain's / these |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        plain = next(r for r in rows if r["phase"] == row["phase"])
        cells = [row["form"], row["phase"]]
        if "ms" in row:
            ms = row["ms"]
            cells += [f"{ms['median']:.0f} ({ms['low']:.0f}–{ms['high']:.0f})", f"{row['cpu_ms']['median']:.0f}"]
            cells += [f"{ms['median'] / plain['ms']['median']:.2f}" if "ms" in plain else "–"]
            cells += ["–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
        else:
            cells += [row["refused"], "–", "–", "–"]
        cells += [f"{row['temporary_mib']:.0f}", f"{plain['temporary_mib'] / max(row['temporary_mib'], 1e-9):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ask(pipe: Connection, phase: str) -> dict[str, Any]:
    pipe.send(phase)
    try:
        return pipe.recv()
    except EOFError as error:
        raise RuntimeError("a benchmark process died: out of memory?") from error


def _serve(pipe: Connection, form: str, case: Case) -> None:
    """In a process of its own: answers a phase's first request with its memory, and the others with their time."""
    shape = case.batch, case.length
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*shape, case.width), case.dtype)
    matrix = (jax.random.normal(keys[1], (case.width, case.vocabulary)) * case.width**-0.5).astype(case.dtype)
    targets = jax.random.randint(keys[2], shape, 0, case.vocabulary)
    slopes = jax.random.normal(keys[3], shape)  # what a loss would send back
    score = partial(FORMS[form], chunk_size=case.chunk_size)

    def forward(hidden: jax.Array, matrix: jax.Array) -> Any:
        logps, entropy = score(hidden, matrix, targets)
        return (logps, entropy) if case.entropy else logps

    def loss(hidden: jax.Array, matrix: jax.Array) -> Any:
        logps, entropy = score(hidden, matrix, targets)
        return (logps * slopes).sum(), entropy if case.entropy else None

    functions = {"forward": forward, "forward+backward": jax.value_and_grad(loss, (0, 1), has_aux=True)}
    programs: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            phase = pipe.recv()
        except EOFError:
            return
        if phase in programs:
            pipe.send(_timed(programs[phase], hidden, matrix))
        else:
            compiled = jax.jit(functions[phase]).lower(hidden, matrix).compile()
            programs[phase] = compiled
            pipe.send(_memory(compiled, hidden, matrix))


def _timed(program: Callable[..., Any], *arguments: jax.Array) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(program(*arguments))
    return {"ms": 1e3 * (time.perf_counter() - start), "cpu_ms": 1e3 * (time.process_time() - cpu)}


def _memory(compiled: Any, *arguments: jax.Array) -> dict[str, Any]:
    """XLA's own count of temporaries, and what the first call adds to the memory in use; or why it was not called."""
    analysis = compiled.memory_analysis()
    memory: dict[str, Any] = {"temporary_mib": analysis.temp_size_in_bytes / 2**20}
    needed = (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**30 + SPARE
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and (free := _proc("meminfo", "MemAvailable")) is not None and free < 2**30 * needed:
        return memory | {"refused": f"not run: needs {needed:.1f} GiB, {free / 2**30:.1f} are free"}
    before = _in_use()
    jax.block_until_ready(compiled(*arguments))
    after = _peak()
    return memory | {"peak_mib": None if before is None or after is None else (after - before) / 2**20}


def _in_use() -> int | None:
    """Bytes in use now; the peak starts again from here where the system can do that."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["bytes_in_use"]
    reset = Path("/proc/self/clear_refs")
    if reset.exists() and os.access(reset, os.W_OK):
        reset.write_text("5", encoding="ascii")
    return _proc("self/status", "VmRSS")


def _peak() -> int | None:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return _proc("self/status", "VmHWM")


def _proc(file: str, name: str) -> int | None:
    """An entry in kB of a file of Linux's /proc, in bytes; None on other systems."""
    path = Path("/proc") / file
    if not path.exists():
        return None
    line = next((x for x in path.read_text(encoding="ascii").splitlines() if x.startswith(name + ":")), None)
    return None if line is None else 1024 * int(line.split()[1])


def _logits(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.dot(hidden, matrix, preferred_element_type=jnp.float32)


def _plain(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, *, chunk_size: int | None) -> Any:
    log_probs = jax.nn.log_softmax(_logits(hidden, matrix))
    logps = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return logps, jax.lax.stop_gradient(-(jnp.exp(log_probs) * log_probs).sum(-1))


def _plain_logsumexp(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, *, chunk_size: int | None) -> Any:
    """The thriftiest plain form: the normalised log-probabilities of all tokens are not written down."""
    logits = _logits(hidden, matrix)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    logps = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normaliser
    probs = jnp.exp(logits - normaliser[..., None])
    return logps, jax.lax.stop_gradient(normaliser - (probs * logits).sum(-1))


def _checkpointed(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, *, chunk_size: int | None) -> Any:
    """Chunks along T that autodiff recomputes; T must be a multiple of the chunk here."""
    batch, length, width = hidden.shape
    size = chunk_size or max(1, 512 // batch)
    score = jax.checkpoint(lambda x: _plain(x[0], matrix, x[1], chunk_size=None))
    cut = lambda x, *rest: x.reshape(batch, length // size, size, *rest).swapaxes(0, 1)  # noqa: E731
    outputs = jax.lax.map(score, (cut(hidden, width), cut(targets)))
    return tuple(x.swapaxes(0, 1).reshape(batch, length) for x in outputs)


FORMS: dict[str, Callable[..., Any]] = {
    "plain": _plain,
    "plain, log-sum-exp": _plain_logsumexp,
    "checkpointed chunks": _checkpointed,
    "completion_logps": completion_logps,
}


def main(arguments: list[str]) -> None:
    """Prints a table per vocabulary and writes logps.json."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    options, measured = flags.FLAGS, []
    for vocabulary in [64] if options.quick else map(int, options.vocabularies):
        batch, length, width, chunk_size = options.batch, options.length, options.width, options.chunk_size
        if options.quick:
            batch, length, width, chunk_size = 4, 8, 16, 2
        case = Case(batch, length, width, vocabulary, options.dtype, chunk_size, options.entropy)
        rows = compare(case, 2 if options.quick else options.repeats)
        print(", ".join(f"{k}={v}" for k, v in case._asdict().items()), f"\n\n{table(rows)}", sep="", flush=True)
        measured += rows
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "logps.json").write_text(json.dumps({"machine": machine, "rows": measured}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_list("vocabularies", ["32000", "151936"], "Sizes V of the vocabulary.")
    flags.DEFINE_integer("batch", 64, "Rows B.")
    flags.DEFINE_integer("length", 128, "Positions T.")
    flags.DEFINE_integer("width", 256, "Model width D.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of hidden states and unembedding.")
    flags.DEFINE_integer("chunk_size", None, "Positions per chunk and row; by default what completion_logps chooses.")
    flags.DEFINE_bool("entropy", False, "Compute the entropy too, without its gradient, as the trainer does.")
    flags.DEFINE_integer("repeats", 5, "Rounds.")
    flags.DEFINE_string("out", "runs/benchmarks", "Where logps.json goes.")
    flags.DEFINE_bool("quick", False, "Tiny sizes, for tests.")
    app.run(main)

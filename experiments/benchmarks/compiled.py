"""What compilers of accelerators make of our programs, without a device: `python -m experiments.benchmarks.compiled`.

python -m experiments.benchmarks.compiled --target=v5e|v6e|v5p|H200|here [--size=0.5B,1.5B,7B] [--rows=64,256,512]
    [--works=sampling,update,iteration] [--lengths=fixed,ragged] [--details] [--check|--write]

Models shaped like Qwen2.5, prompts of 256 and completions of 1,024 tokens, groups of 16; 0.5B and 1.5B on one device, 7B on the
mesh of `TARGETS`. Printed for each program: the memory that it takes on a device, the bytes that its decoding steps move beside
those that must move (counted by hand, see limits.py), the least time of either, transfers between devices, arrays of [L, L] and
[tokens, V], float32 products, and the CPU seconds of compiling. A TPU needs ``pip install libtpu`` of jax's version, an H200
``pip install jax[cuda13]``; kernels that are chosen by timing them are then chosen by rules. ``--check`` fails where a ratio has
become 20 % worse than compiled_baseline.json has it, which ``--write`` writes.
"""

import json
import math
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import programs
from experiments.benchmarks.limits import (
    H200,
    Device,
    Work,
    cache_bytes,
    decode_steps,
    held_bytes,
    kept_bytes,
    rollout_bytes,
    rollout_seconds,
    update_flops,
)
from experiments.benchmarks.programs import SIZES, WORKS, Setting
from experiments.benchmarks.race import among, write_json
from experiments.benchmarks.traffic import Loop, arrays, loops, products
from grpo_jax.models.tpu_attention import slots_read
from grpo_jax.rollout.compaction import Stage, choose_stages
from grpo_jax.runs.memory import format_bytes
from grpo_jax.runs.topologies import CAPACITY, collectives, out_of_memory, topology_devices
from grpo_jax.train.sharding import make_mesh, row_shards

BASELINE = Path(__file__).with_name("compiled_baseline.json")
WORSE = 1.2


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
      one: a topology whose first device 0.5B and 1.5B are compiled for.
      many, mesh: a topology for 7B, and how its devices are laid out.
      device: what one can do at best, as its vendor says, or as measured.
    """

    one: str
    many: str
    mesh: dict[str, int]
    device: Device


TARGETS = {
    "v5e": Target("v5e:2x2", "v5e:4x4", {"fsdp": 4, "tensor": 4}, Device(197e12, 0.819e12, None)),
    "v6e": Target("v6e:2x2", "v6e:4x4", {"fsdp": 4, "tensor": 4}, Device(918e12, 1.64e12, None)),
    "v5p": Target("v5p:2x2x1", "v5p:2x2x1", {"fsdp": 2, "tensor": 2}, Device(459e12, 2.765e12, None)),
    "H200": Target("h200:1", "h200:8", {"fsdp": 8}, H200),
}


def mesh_of(target: str, size: str) -> jax.sharding.Mesh:
    """The devices that a size is compiled for.

    Raises:
      ValueError: there is no compiler for them, or too few of them are here; says what to do.
    """
    if target == "here":
        return make_mesh(devices=jax.devices()[:1])
    if size == "7B":
        return make_mesh(**TARGETS[target].mesh, devices=topology_devices(TARGETS[target].many))
    return make_mesh(devices=topology_devices(TARGETS[target].one)[:1])


def read(work: str, setting: Setting, target: str) -> tuple[dict[str, Any], list[Loop]]:
    """The row of a program compiled for a target, and what it does once and in each of its loops, the largest first."""
    mesh = mesh_of(target, setting.size)
    config = programs.decoder(setting, mesh)
    load, shards = setting.work, row_shards(mesh, setting.rows // setting.group)
    own = Work(load.lengths[: len(load.lengths) // shards], load.prompt)  # of the first device
    device = TARGETS[target].device if target in TARGETS else H200
    row: dict[str, Any] = {
        "work": work,
        "setting": setting._asdict(),
        "target": target,
        "devices": mesh.size,
        "tokens": load.tokens,
        "capacity": CAPACITY.get(mesh.devices.flat[0].device_kind),
        "needed_memory": int(_needed_memory(work, setting, own, mesh)),
        "limit_seconds": _limit_seconds(work, setting, own, mesh, device),
    }
    function, shapes = programs.build(work, setting, mesh)
    start = cpu_seconds()
    try:
        compiled, text = compile_with_text(function.lower(*shapes))
    except jax.errors.JaxRuntimeError as error:
        if (needed := out_of_memory(error)) is None:
            raise
        return row | {"fits": False, "memory": needed, "compile_seconds": cpu_seconds() - start}, []
    row |= {
        "fits": True,
        "compile_seconds": cpu_seconds() - start,
        "memory": memory_of(compiled),
        "transfers": collectives(text),
        "products": dict(products(text)),
        **_large(text, setting, config.vocab_size // mesh.shape["tensor"]),
    }
    program, *inside = loops(text)
    inside.sort(key=lambda loop: -loop.moved)
    row["ratios"] = {"memory": row["memory"] / row["needed_memory"]}
    if work == "sampling":
        by_stage = {decoding_stage(loop): loop.moved for loop in inside}
        stages = choose_stages(own.lengths.size, setting.completion, by_slots=not config.decode_kernel)
        moved = 0.0
        for (rows, slots), positions in decoding_passes(own.lengths, stages).items():
            moved += len(positions) * by_stage.get((rows, slots), math.nan)
            if config.decode_kernel:  # whose loops are counted with full slots
                empty = sum(slots - slots_read(position, slots) for position in positions)
                moved -= cache_bytes(config) / mesh.shape["tensor"] * rows * empty
        needed = decode_steps(config, own)[0] / mesh.shape["tensor"]
        full = Work(np.full_like(own.lengths, setting.completion), own.prompt)
        row |= {
            "step": by_stage[max(filter(None, by_stage))],  # most rows, most slots
            "step_needed": float(decode_steps(config, full)[0][-1]) / mesh.shape["tensor"],
            "moved": program.moved + moved,
        }
        row["ratios"] |= {"step": row["step"] / row["step_needed"], "steps": moved / needed.sum()}
    elif work == "update":
        row["moved"] = program.moved + programs.blocks(setting) * (inside[0].moved if inside else 0)
    row["moved_seconds"] = row["moved"] / device.bandwidth if "moved" in row else None
    return row, [program, *inside]


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program and its optimised HLO, which the compiler writes into a file: of a v6e, jax cannot read it back."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        text = written[-1].read_text(encoding="utf-8") if written else compiled.as_text()
    assert text is not None
    return compiled, text


def memory_of(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device."""
    sizes = compiled.memory_analysis()
    assert sizes is not None
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


def cpu_seconds() -> float:
    """Of this process so far."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def decoding_passes(lengths: np.ndarray, stages: tuple[Stage, ...]) -> dict[tuple[int, int], list[int]]:
    """The positions that the loop of each (rows, slots) samples, for completions of these lengths: see compaction.py.

    >>> decoding_passes(np.array([[4, 2, 3], [5, 1, 2]]), (Stage(6, (5,)), Stage(3, (5,)), Stage(1, (5,))))
    {(6, 5): [1], (3, 5): [2, 3], (1, 5): [4]}
    """
    passes: dict[tuple[int, int], list[int]] = {}
    position, longest = 1, lengths.max()
    for stage, fewer in zip(stages, [*(stage.rows for stage in stages[1:]), 0], strict=True):
        for slots in stage.slots:
            while position < min(slots + 1, longest) and (lengths > position).sum() > fewer:
                passes.setdefault((stage.rows, slots), []).append(position)
                position += 1
    return passes


def decoding_stage(loop: Loop) -> tuple[int, int] | None:
    """(rows, slots) of the loop, if it is one of decoding.

    >>> decoding_stage(Loop("while", 1, [], ["jit(f)/decode_64_rows_8_slots/while/body/add"]))
    (64, 8)
    """
    found = [re.search(r"decode_(\d+)_rows_(\d+)_slots/while/body", path) for path in loop.paths]
    scopes = [(int(match[1]), int(match[2])) for match in found if match]
    return max(set(scopes), key=scopes.count) if 2 * len(scopes) > len(found) else None


def case(row: dict[str, Any]) -> str:
    """What the baseline calls a row.

    >>> case({"work": "update", "setting": Setting("0.5B", 64)._asdict()})
    'update 0.5B 64 fixed'
    """
    setting = row["setting"]
    return f"{row['work']} {setting['size']} {setting['rows']} {'ragged' if setting['ragged'] else 'fixed'}"


def regressions(rows: list[dict[str, Any]], baseline: dict[str, dict[str, float]]) -> list[str]:
    """A line for each ratio that is more than 20 % above that of the baseline, and for what does not fit any more.

    >>> regressions([{"work": "update", "setting": Setting("0.5B", 64)._asdict(), "ratios": {"memory": 1.3}, "fits": True}],
    ...             {"update 0.5B 64 fixed": {"memory": 1.0}})
    ['update 0.5B 64 fixed: memory is 1.30 × what must be, and was 1.00 × in the baseline']
    """
    lines = []
    for row in rows:
        expected = baseline.get(case(row), {})
        if expected and not row["fits"]:
            lines.append(f"{case(row)}: does not fit any more")
            continue
        now = row.get("ratios", {})
        lines += [
            f"{case(row)}: {name} is {now[name]:.2f} × what must be, and was {before:.2f} × in the baseline"
            for name, before in expected.items()
            if not now[name] <= WORSE * before
        ]
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `read` as Markdown. In brackets: what must be; × is the ratio to it.

    A step is one of all rows with full slots; *steps* are all those of the rollout. The time of bytes is theirs at the device's
    bandwidth, and the limit that of what must be moved or computed.

    >>> print(table([]).splitlines()[0][:43])
    | program | GiB of (must) | GB a step | ste
    """
    head = ["program", "GiB of (must)", "GB a step", "steps", "s of bytes", "s, limit", "between devices"]
    head += ["[L, L]", "[tokens, V]", "float32 products", "CPU s of compiling"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        of = "?" if row["capacity"] is None else f"{row['capacity'] / 2**30:.0f}"
        memory = f"{row['memory'] / 2**30:.1f} of {of} ({row['needed_memory'] / 2**30:.1f})"
        name = case(row) + (f", {row['devices']} devices" if row["devices"] > 1 else "")
        if not row["fits"]:
            lines.append("| " + " | ".join([name, f"**does not fit**: {memory}", *["–"] * (len(head) - 2)]) + " |")
            continue
        cells = [name, memory]
        if "step" in row:
            step, steps = row["ratios"]["step"], row["ratios"]["steps"]
            cells += [f"{row['step'] / 1e9:.2f} ({row['step_needed'] / 1e9:.2f}): {step:.2f} ×", f"{steps:.2f} ×"]
        else:
            cells += ["–", "–"]
        cells += [f"{row['moved_seconds']:.3g}" if row["moved_seconds"] is not None else "–"]
        cells += [f"{row['limit_seconds']:.3g}"]
        moved = [f"{number} {kind} {format_bytes(size)}" for kind, (number, size) in row["transfers"].items()]
        cells += [", ".join(moved) or "none", row["square"] or "none", row["logits"] or "none"]
        float32 = sum(count for kinds, count in row["products"].items() if "f32" in kinds)
        cells += [f"{float32} of {sum(row['products'].values())}", f"{row['compile_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe(loops: list[Loop], device: Device, most: int = 10) -> Iterator[str]:
    """Lines on the program and its largest loops: bytes of a pass, their least time, and what moves most."""
    for loop in loops[:4]:
        stage = decoding_stage(loop)
        name = loop.name if stage is None else f"decoding, {stage[0]} rows and {stage[1]} slots"
        yield f"  {name}: {loop.moved / 1e9:.2f} GB a pass, {1e3 * loop.moved / device.bandwidth:.2f} ms"
        for what, moved in loop.movers[:most]:
            yield f"    {moved / 1e9:8.3f} GB  {what}"


def _limit_seconds(work: str, setting: Setting, own: Work, mesh: jax.sharding.Mesh, device: Device) -> float:
    """Of one device's share: every decoding step is bound by bytes or products, and the update by products."""
    config = programs.decoder(setting)
    total = 0.0
    if work != "update":
        total += rollout_seconds(config, own, device) / mesh.shape["tensor"]
    if work != "sampling":
        total += update_flops(config, setting.work) / mesh.size / device.flops
    return float(total)


def _needed_memory(work: str, setting: Setting, own: Work, mesh: jax.sharding.Mesh) -> float:
    """Bytes of one device: see limits.py."""
    config, spread = programs.decoder(setting), mesh.shape["fsdp"] * mesh.shape["tensor"]
    update = held_bytes(config) / spread + kept_bytes(config, setting.microbatch) / mesh.shape["tensor"]
    # Of what is decoded with, a device has its share of the float32 parameters and of the bfloat16 copy that is gathered.
    sampling = rollout_bytes(config, own, spread) / mesh.shape["tensor"]
    return {
        "sampling": sampling,
        "update": update,
        "iteration": max(update, sampling + held_bytes(config) / 2 / spread),
    }[work]


def _large(text: str, setting: Setting, vocabulary: int) -> dict[str, str | None]:
    """The largest array in memory with two axes of a completion's length, and the largest with logits of many positions."""
    length, rows, width = setting.completion, setting.rows, SIZES[setting.size][1]
    found: dict[str, str | None] = {"square": None, "logits": None}
    for shape, dims, size in arrays(text):
        positions = math.prod(dims) // vocabulary
        is_square = sum(length - 1 <= n <= length + setting.prompt for n in dims) >= 2
        if is_square and math.prod(dims) > (length + setting.prompt) ** 2:
            kind = "square"
        elif vocabulary in dims and positions > rows and positions != width:
            kind = "logits"
        else:
            continue
        found[kind] = found[kind] or f"{shape} {format_bytes(size)}"
    return found


def numbers_of_rows(arguments: list[str]) -> list[int]:
    """Those of --rows; refuses what is not understood."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    rows, group = flags.FLAGS.rows, Setting("", 0).group
    if any(not n.isdigit() or not int(n) or int(n) % group for n in rows):
        raise app.UsageError(f"--rows={','.join(rows)} must be multiples of {group}")
    return [int(n) for n in rows]


def main(arguments: list[str]) -> None:
    """Prints a table and writes compiled_TARGET.json, after every program."""
    options, rows = flags.FLAGS, []
    numbers = numbers_of_rows(arguments)
    settings = [Setting(s, n, ragged=r == "ragged") for s in options.size for n in numbers for r in options.lengths]
    device = TARGETS[options.target].device if options.target in TARGETS else H200
    for setting in settings:
        for work in options.works:
            try:
                row, inside = read(work, setting, options.target)
            except ValueError as error:
                raise SystemExit(f"--target={options.target}: {error}") from error
            rows.append(row)
            print(table([row]) if len(rows) == 1 else table([row]).splitlines()[-1], flush=True)
            if options.details:
                print(*describe(inside, device), sep="\n", flush=True)
            write_json(options.out, f"compiled_{options.target}", rows, "compiled")
    print(f"\n{table(rows)}")
    baseline = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    if options.write:
        new = {case(row): {name: round(x, 3) for name, x in row["ratios"].items()} for row in rows if row["fits"]}
        baseline[options.target] = baseline.get(options.target, {}) | new
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.check and (worse := regressions(rows, baseline.get(options.target, {}))):
        sys.exit("\n".join(worse))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # which holds no array: the compilers do not need their devices
    flags.DEFINE_enum(
        "target", None, [*TARGETS, "here"], "What to compile for; here: this machine's CPU.", required=True
    )
    flags.DEFINE_list("size", ["0.5B"], f"Models: {', '.join(SIZES)}.")
    flags.DEFINE_list("rows", ["64", "256", "512"], "Completions B at a time, on all devices.")
    flags.DEFINE_list("works", list(WORKS), f"Of {', '.join(WORKS)}.")
    flags.DEFINE_list("lengths", ["fixed", "ragged"], "Of the completions.")
    flags.DEFINE_bool("details", False, "Print what moves most in the largest loops.")
    flags.DEFINE_bool("check", False, "Fail where a ratio is 20 % worse than its baseline.")
    flags.DEFINE_bool("write", False, "Write the ratios as the baseline.")
    flags.DEFINE_string("out", "runs/benchmarks", "Where the JSON goes.")
    among("size", list(SIZES))
    among("works", list(WORKS))
    among("lengths", ["fixed", "ragged"])
    app.run(main)

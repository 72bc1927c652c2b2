"""Ours beside plain JAX and Tunix, compiled for the same accelerator, which is not there: memory and bytes.

python -m experiments.benchmarks.compiled_peers --target=v5e|v6e|v5p|H200 [--rows=64,256,512] [--works=sampling,update]

Qwen2.5-0.5B, prompts of 256 and completions of 1,024 tokens, groups of 16, bfloat16 products, as in compiled.py. Of sampling, the
steps of a rollout of fixed lengths are counted, each with as many slots as the program reads; of Tunix the loop alone, without
prompts. Updates of the peers are made of the most rows at a time that fit, a power of two, with one step of AdamW, and without
the bytes of adding up their gradients; ours has micro-batches of its own.
Tunix takes part where ``GRPO_JAX_TUNIX_PYTHON`` names its interpreter, see peers.py, with the compiler installed there too.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import compiled, plain
from experiments.benchmarks.compiled import TARGETS
from experiments.benchmarks.programs import SIZES, Setting, decoder
from experiments.benchmarks.race import among, write_json
from experiments.benchmarks.traffic import loops
from grpo_jax.manifests import parse_cluster
from grpo_jax.models import param_shapes
from grpo_jax.runs.topologies import H200_DESCRIPTION, out_of_memory

HERE = Path(__file__).parent


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      text: optimised HLO; None where it does not fit.
      memory: bytes that it takes, or would.
      compile_seconds: of the CPU.
    """

    text: str | None
    memory: int
    compile_seconds: float


def compile_plain(work: str, setting: Setting, target: str) -> Program:
    """The yardstick of plain.py: sampling with bfloat16 parameters, updates in float32, which a TPU multiplies as bfloat16."""
    mesh = compiled.mesh_of(target, setting.size)
    here = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    layers, width, heads, kv_heads, head_dim, d_ff, vocabulary = SIZES[setting.size]
    dtype = jnp.bfloat16 if work == "sampling" else jnp.float32

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    query, key = heads * head_dim, kv_heads * head_dim
    layer = {"attention_norm": (width,), "mlp_norm": (width,), "query": (width, query), "key": (width, key)}
    layer |= {"value": (width, key), "output": (query, width), "query_bias": (query,), "key_bias": (key,)}
    layer |= {"value_bias": (key,), "gate": (width, d_ff), "up": (width, d_ff), "down": (d_ff, width)}
    params = {"embedding": array(vocabulary, width), "final_norm": array(width)}
    params["layers"] = [{name: array(*shape) for name, shape in layer.items()} for _ in range(layers)]
    number = partial(array, dtype=jnp.int32)
    if work == "sampling":
        options: dict[str, Any] = {"group": setting.group, "length": setting.completion, "head_dim": head_dim}
        key_shape = jax.eval_shape(lambda: jax.random.key(0))
        random = jax.ShapeDtypeStruct(key_shape.shape, key_shape.dtype, sharding=here)
        prompts = number(setting.rows // setting.group, setting.prompt)
        lowered = plain.sample.lower(params, prompts, random, **options, eos=vocabulary, compact=False)
    else:
        length, tokens = setting.prompt + setting.completion, setting.rows * setting.completion
        batch = {name: number(setting.rows, length) for name in ("tokens", "positions", "segments")}
        batch |= {name: number(tokens) for name in ("source", "target")}
        batch |= {name: array(tokens) for name in ("advantage", "weight")}
        lowered = plain.learn.lower((params, params, params, number()), batch, head_dim=head_dim)
    start = compiled.cpu_seconds()
    try:
        program, text = compiled.compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
        if (needed := out_of_memory(error)) is None:
            raise
        return Program(None, needed, compiled.cpu_seconds() - start)
    return Program(text, compiled.memory_of(program), compiled.cpu_seconds() - start)


def compile_tunix(work: str, setting: Setting, target: str) -> Program:
    """Tunix' programs, by its own interpreter: see tunix_programs.py."""
    cluster = parse_cluster(TARGETS[target].one)
    if cluster.is_tpu:
        topology: dict[str, Any] = {"topology": (f"{cluster.kind}:{cluster.grid}", "tpu"), "topology_options": {}}
    else:
        options = {"topology": "1x1x1", "target_config": H200_DESCRIPTION}
        topology = {"topology": ("", "cuda"), "topology_options": options}
    with tempfile.TemporaryDirectory() as folder:
        request = {"work": work, "sizes": SIZES[setting.size], "folder": folder, **topology}
        request |= {name: getattr(setting, name) for name in ("rows", "group", "prompt", "completion")}
        done = subprocess.run(
            [os.environ["GRPO_JAX_TUNIX_PYTHON"], HERE / "tunix_programs.py"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(f"Tunix: {done.stderr.strip().splitlines()[-1]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        if "error" in answer:
            if (needed := out_of_memory(RuntimeError(answer["error"]))) is None:
                raise ValueError(f"Tunix: {answer['error']}")
            return Program(None, needed, 0.0)
        text = (Path(folder) / "program.txt").read_text(encoding="utf-8")
        return Program(text, answer["memory"], answer["compile_seconds"])


def read(name: str, work: str, setting: Setting, target: str) -> dict[str, Any]:
    """The row of a program: what compiled.py says of ours, and of a peer the same."""
    if name == "ours":
        row, _ = compiled.read(work, setting, target)
        found = {key: row[key] for key in ("work", "fits", "memory", "compile_seconds")} | {"rows": setting.rows}
        return found | {"program": name, "step": row.get("step"), "moved": row.get("moved"), "at_once": setting.rows}
    form = {"plain": compile_plain, "tunix": compile_tunix}[name]
    at_once = setting.rows
    program = form(work, setting, target)
    while work == "update" and program.text is None and at_once > 1:
        at_once //= 2
        if at_once <= setting.group:  # more never fit
            program = form(work, setting._replace(rows=at_once), target)
    found = {"work": work, "rows": setting.rows, "program": name, "at_once": at_once}
    found |= {"memory": program.memory, "compile_seconds": program.compile_seconds, "fits": program.text is not None}
    if program.text is None:
        return found | {"step": None, "moved": None}
    outside, *inside = loops(program.text)
    if work == "update":
        times = setting.rows // at_once
        return found | {"step": None, "moved": outside.moved * times - adamw_bytes(setting.size) * (times - 1)}
    step = max(loop.moved for loop in [outside, *inside] if loop.name != "program")
    program_moved = outside.moved if name == "plain" else 0
    return found | {"step": step, "moved": program_moved + step * (setting.completion - 1)}


def adamw_bytes(size: str) -> int:
    """What a step of AdamW moves at least: float32 parameters, both moments and the gradient are read, and all but it written.

    >>> round(adamw_bytes("0.5B") / 1e9, 1)
    13.8
    """
    shapes = param_shapes(decoder(Setting(size, 16)))
    return 7 * 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))


def table(rows: list[dict[str, Any]], bandwidth: float) -> str:
    """Rows of `read` as Markdown; × is the ratio to ours.

    >>> ours = {"work": "update", "rows": 64, "program": "ours", "fits": True, "memory": 2**30, "compile_seconds": 9.0}
    >>> ours |= {"step": None, "moved": 2e9, "at_once": 64}
    >>> print(table([ours, ours | {"program": "plain", "moved": 3e9, "at_once": 8}], 1e9).splitlines()[-1])
    | update, 64 rows | plain, 8 at a time | 1.0 (1.0 ×) | – | 3 (1.5 ×) | 9 |
    """
    lines = ["| | program | GiB | GB a full step | s of bytes | CPU s of compiling |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours = next(x for x in rows if x["program"] == "ours" and (x["work"], x["rows"]) == (row["work"], row["rows"]))
        times = lambda key, ours=ours, row=row: (  # noqa: E731
            "" if row is ours or not ours[key] else f" ({row[key] / ours[key]:.1f} ×)"
        )
        name = row["program"] + (f", {row['at_once']} at a time" if row["at_once"] != row["rows"] else "")
        cells = [f"{row['work']}, {row['rows']} rows", name, f"{row['memory'] / 2**30:.1f}{times('memory')}"]
        if not row["fits"]:
            cells[-1] = f"**does not fit**: {cells[-1]}"
        cells += ["–" if row["step"] is None else f"{row['step'] / 1e9:.2f}{times('step')}"]
        cells += ["–" if row["moved"] is None else f"{row['moved'] / bandwidth:.3g}{times('moved')}"]
        lines.append("| " + " | ".join([*cells, f"{row['compile_seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Prints a table, and writes compiled_peers_TARGET.json after every program."""
    options, rows = flags.FLAGS, []
    numbers = compiled.numbers_of_rows(arguments)
    names = ["ours", "plain", *(["tunix"] if "GRPO_JAX_TUNIX_PYTHON" in os.environ else [])]
    bandwidth = TARGETS[options.target].device.bandwidth
    for work in options.works:
        for number in numbers:
            for name in names:
                try:
                    rows.append(read(name, work, Setting("0.5B", number), options.target))
                except ValueError as error:
                    raise SystemExit(f"--target={options.target}: {error}") from error
                print(table(rows, bandwidth).splitlines()[-1], flush=True)
                write_json(options.out, f"compiled_peers_{options.target}", rows, "compiled_peers")
    print(f"\n{table(rows, bandwidth)}")
    if "tunix" not in names:
        print(
            "GRPO_JAX_TUNIX_PYTHON names no interpreter: Tunix was left out; see experiments/README.md", file=sys.stderr
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # which holds no array: the compilers do not need their devices
    flags.DEFINE_enum("target", None, list(TARGETS), "What to compile for.", required=True)
    flags.DEFINE_list("rows", ["64", "256", "512"], "Completions B at a time.")
    flags.DEFINE_list("works", ["sampling", "update"], "Of sampling, update.")
    flags.DEFINE_string("out", "runs/benchmarks", "Where the JSON goes.")
    among("works", ["sampling", "update"])
    app.run(main)

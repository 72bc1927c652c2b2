"""Memory and time of loading a checkpoint of a billion parameters, and of one GRPO step on it.

python -m experiments.benchmarks.loading [--optimizer=adafactor] [--nostep] [--out=runs/benchmarks]

Writes a random checkpoint of the shape of Llama-3.2-1B (bfloat16, in shards, a tensor at a time) into a temporary folder, and
loads it in fresh processes: on one device, then spread over eight (those of one CPU stand for eight). Beside the arrays the
host may hold 1.3 times the largest share of an array that a device gets, and one tensor. Then one more process takes a step:
rollout, advantages, gradient, optimizer, for an objective without a reference. A step that does not fit is not run.
"""

import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from grpo_jax.environment import prepare_environment
from grpo_jax.models import DecoderConfig, load_pretrained, param_shapes, read_config
from grpo_jax.models.families import config_entries
from grpo_jax.models.weight_names import expected_tensors
from grpo_jax.objective import DAPO
from grpo_jax.rollout import Layout, PromptBatch, sample_groups
from grpo_jax.train.iteration import Recipe, learn
from grpo_jax.train.sharding import make_mesh, parameter_shardings
from grpo_jax.train.step import init_state

ONE_BILLION = DecoderConfig(
    128_256, 16, 2048, num_heads=32, num_kv_heads=8, head_dim=64, d_ff=8192, max_length=1024, rope_theta=500_000.0
)
QUICK = DecoderConfig(16_384, 8, 512, num_heads=8, num_kv_heads=2, head_dim=64, d_ff=4096, max_length=1024)
FILE_BYTES = 1 << 30
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adafactor": lambda: optax.adafactor(1e-6),
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, mu_dtype=jnp.bfloat16)),
    "sgd": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-6)),
}
SPARE = 1.0  # GiB that must stay free beside what the step holds: the machine may have other work


def write_checkpoint(folder: Path, config: DecoderConfig) -> int:
    """A random bfloat16 model in shards, written a tensor at a time; its bytes."""
    generator, total = np.random.default_rng(0), 0
    files: list[list[Any]] = [[]]
    for target in expected_tensors(config):
        if 2 * sum(math.prod(t.shape) for t in [*files[-1], target]) > FILE_BYTES:
            files.append([])
        files[-1].append(target)
    where = {}
    for number, targets in enumerate(files, 1):
        name, header, end = f"model-{number:05}-of-{len(files):05}.safetensors", {}, 0
        for target in targets:
            begin, end = end, end + 2 * math.prod(target.shape)
            header[target.name] = {"dtype": "BF16", "shape": target.shape, "data_offsets": [begin, end]}
            where[target.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for target in targets:
                values = np.ones(target.shape, np.float32)
                if len(target.shape) > 1:
                    values = 0.02 * generator.standard_normal(target.shape, np.float32)
                file.write(values.astype(jnp.bfloat16).tobytes())
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_entries(config)), encoding="utf-8")
    return total


def measure_load(folder: Path, devices: int) -> dict[str, Any]:
    """In a process of its own: bytes in use before and at the peak, of the parameters, and what is allowed beside these."""
    config, shardings = read_config(folder), None
    shapes = param_shapes(config)
    shares = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    if devices > 1:
        shardings = partial(parameter_shardings, mesh=make_mesh(data=1, fsdp=devices))
        placed = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings(shapes)), strict=True)
        shares = [math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in placed]
    tensor = 2 * max(math.prod(target.shape) for target in expected_tensors(config))
    jax.block_until_ready(jnp.zeros(()))
    before, start = _memory("VmRSS"), time.perf_counter()
    params = jax.block_until_ready(load_pretrained(folder, shardings=shardings)[1])
    seconds = time.perf_counter() - start
    parameter_bytes = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    sizes = {"parameters": parameter_bytes, "share": 4 * max(shares), "allowed": round(1.3 * 4 * max(shares)) + tensor}
    return {"seconds": seconds, "before": before, "peak": _memory("VmHWM"), **sizes}


def measure_step(folder: Path, optimizer_name: str) -> dict[str, Any]:
    """In a process of its own: loads, samples two short completions of a prompt, and takes a step whose state is donated."""
    optimizer, start = OPTIMIZERS[optimizer_name](), time.perf_counter()
    policy, params = load_pretrained(folder)
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tokens = jax.random.randint(jax.random.key(0), (1, 16), 3, read_config(folder).vocab_size)
    prompts = PromptBatch(tokens, tokens > 0, jnp.zeros(1, jnp.int32))
    sample = jax.jit(partial(sample_groups, policy, group_size=2, max_completion=16, stop_ids=(2,)))
    rollout = jax.block_until_ready(sample(params, prompts, jax.random.key(1)))
    numbers: dict[str, Any] = {
        "parameters": parameter_bytes,
        "optimizer": optimizer_name,
        "sampled": time.perf_counter() - start,
    }

    recipe = Recipe(policy, DAPO, sample, lambda _: optimizer, Layout(microbatch_tokens=1024))
    update = jax.jit(partial(learn, recipe), donate_argnums=0)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
    rest = (None, prompts, rollout, jnp.array([[1.0, 0.0]]), jax.random.key(2), jnp.float32(0.0), jnp.float32(0.0))
    program = update.lower(state, *rest).compile()
    analysis: Any = program.memory_analysis()
    numbers["needed"] = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    more, free = numbers["needed"] - parameter_bytes + SPARE * 2**30, _memory("MemAvailable", "meminfo")
    if free is not None and free < more:
        return numbers | {"refused": f"not run: needs {more / 1e9:.1f} GB more, {free / 1e9:.1f} are free"}
    donated = init_state(params, optimizer)
    del params
    start = time.perf_counter()
    stepped, metrics = jax.block_until_ready(program(donated, *rest))
    if not (int(stepped.updates) == 1 and 0.0 < float(metrics["loss/grad_norm"]) < math.inf):
        raise RuntimeError(f"the step did nothing: {metrics}")
    return numbers | {"seconds": time.perf_counter() - start, "peak": _memory("VmHWM")}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown.

    >>> print(table([]), end="")
    | what | seconds | parameters, GB | peak RSS, GB | peak − start − parameters, GB | allowed, GB |
    |---|---|---|---|---|---|
    """
    lines = ["| what | seconds | parameters, GB | peak RSS, GB | peak − start − parameters, GB | allowed, GB |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        what = f"load, {row['devices']} devices" if row["what"] == "load" else f"step, {row['optimizer']}"
        if "refused" in row:
            lines.append(f"| {what} | {row['refused']} | {row['parameters'] / 1e9:.2f} | – | – | – |")
            continue
        cells = [what, f"{row['seconds']:.1f}", f"{row['parameters'] / 1e9:.2f}"]
        cells.append("–" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}")
        if row["what"] == "load" and row["peak"] is not None:
            beside = row["peak"] - row["before"] - row["parameters"]
            cells += [f"{beside / 1e9:.2f}", f"{row['allowed'] / 1e9:.2f}"]
        else:
            cells += ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _alone(function: Callable[..., dict[str, Any]], *arguments: Any, devices: int = 1) -> dict[str, Any]:
    """What the function finds in a fresh process with so many devices."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments, devices), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise RuntimeError(f"{function.__name__}{arguments} died: out of memory?") from error
    finally:
        process.join()


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], devices: int) -> None:
    prepare_environment()
    flag = "--xla_force_host_platform_device_count="
    kept = " ".join(x for x in os.environ["XLA_FLAGS"].split() if not x.startswith(flag))
    os.environ["XLA_FLAGS"] = f"{kept} {flag}{devices}"
    pipe.send(function(*arguments))


def _memory(name: str, file: str = "self/status") -> int | None:
    """An entry of Linux's /proc in bytes; None on other systems."""
    path = Path("/proc") / file
    if not path.exists():
        return None
    line = next(x for x in path.read_text(encoding="ascii").splitlines() if x.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def main(arguments: list[str]) -> None:
    """Prints a table and writes loading.json."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    options = flags.FLAGS
    config = QUICK if options.quick else ONE_BILLION
    needed = 2 * sum(math.prod(target.shape) for target in expected_tensors(config))
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < 1.5 * needed:
        raise SystemExit(f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB; the checkpoint needs {needed / 1e9:.1f}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        print(f"{write_checkpoint(Path(name), config) / 1e9:.2f} GB of bfloat16 are written", flush=True)
        for devices in (1, 8):
            found = _alone(measure_load, Path(name), devices, devices=devices)
            rows.append({"what": "load", "devices": devices, **found})
        if options.step:
            rows.append({"what": "step", "devices": 1, **_alone(measure_step, Path(name), options.optimizer)})
    print(f"\n{table(rows)}")
    machine = {"jax": jax.__version__, "cores": os.cpu_count(), "memory": _memory("MemTotal", "meminfo")}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loading.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags.DEFINE_bool("step", True, "Take a step too.")
    flags.DEFINE_enum("optimizer", "adafactor", sorted(OPTIMIZERS), "Of the step.")
    flags.DEFINE_string("out", "runs/benchmarks", "Where loading.json goes.")
    flags.DEFINE_bool("quick", False, "Tiny sizes, for tests.")
    app.run(main)

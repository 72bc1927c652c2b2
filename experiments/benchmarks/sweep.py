"""What a sweep of 16 β as one program costs, beside 16 warm single runs; both end to end, in fresh processes.

    python -m experiments.benchmarks.sweep [--config=configs/small.py] [--singles=2] [--out=runs/benchmarks] [--quick]

A cold run of each fills the compilation cache and is timed too. Then single runs at the ends of the range of β, everything warm,
and the sweep after the first of them. The single runs measure nothing on their way, as the sweep does not; at the end they also
measure the KL and a greedy sample of each prompt, and write a report. Bar: the sweep costs at most half of 16 single runs on
2 cores, 3 single runs on a GPU. Some 15 minutes on 2 quiet cores; --quick (seven iterations of a tiny decoder, start-up all of
it) two or three.

The second table is one iteration of one point under each form of the program: alone with the host after every iteration, ten at
a time, 16 points one after the other (a device per core), and 16 points batched.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.beta_sweep import QUICK, device_per_core

POINTS = 16
BETAS = (0.1, 10.0)


def main(arguments: list[str]) -> None:
    """Times single runs and the sweep, then the forms of an iteration."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    if flags.FLAGS.form is not None:
        print(json.dumps(iteration(flags.FLAGS.form)))
        return
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="sweep-", dir=out))
    try:
        numbers = ends(scratch)
        numbers["iteration"] = [form(name) for name in ("alone", "program", "points", "batched")]
    finally:
        shutil.rmtree(scratch)
    (out / "sweep.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(table(numbers))


def ends(scratch: Path) -> dict[str, Any]:
    """Seconds of the single runs and of the sweep, end to end."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache")}
    changes = [f"--config.{key}={value}" for key, value in (QUICK if flags.FLAGS.quick else {}).items()]

    def single(name: str, beta: float) -> float:
        options = [f"--config={flags.FLAGS.config}", f"--workdir={scratch / name}", f"--config.objective.beta={beta}"]
        once = [f"--config.evaluate.interval={read_config(flags.FLAGS.config).train.iterations}"]
        return seconds([sys.executable, "launch.py", *options, *changes, *once], cache)

    def sweep(name: str) -> float:
        options = [f"--config={flags.FLAGS.config}", f"--out={scratch / name}", "--seeds=0", "--kls=sequence_reverse"]
        return seconds([sys.executable, "-m", "experiments.beta_sweep", *options, *changes], cache)

    cold = {"single_cold": single("cold", 1.0), "sweep_cold": sweep("sweep-cold")}
    singles = [single("warm-0", BETAS[0])]
    warm = sweep("sweep-warm")
    singles += [single(f"warm-{i}", BETAS[i % 2]) for i in range(1, flags.FLAGS.singles)]
    whole = POINTS * statistics.mean(singles)
    return cold | {"singles": singles, "points": POINTS, "sweep": warm, "ratio": warm / whole, "cores": os.cpu_count()}


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a process, which must succeed."""
    begun = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def form(name: str) -> dict[str, Any]:
    """`iteration` in a process of its own, with as many CPU devices as it wants."""
    options = [f"--config={flags.FLAGS.config}", f"--form={name}", *(["--quick"] if flags.FLAGS.quick else [])]
    devices = device_per_core() if name in ("points", "batched") else {}
    command = [sys.executable, "-m", "experiments.benchmarks.sweep", *options]
    done = subprocess.run(command, check=True, env=os.environ | devices, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def iteration(name: str) -> dict[str, Any]:
    """Milliseconds of one iteration of one point: wall and CPU time, medians of five."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from grpo_jax.config import validate
    from grpo_jax.runs.loop import visits
    from grpo_jax.runs.setup import make_setup, put_table
    from grpo_jax.train.sweep_program import POINTS as SPREAD
    from grpo_jax.train.sweep_program import WHOLE, make_sweep_functions, make_sweep_mesh

    config = read_config(flags.FLAGS.config)
    config.mesh.data = 1
    setup = make_setup(config, *validate(config, num_devices=1), devices=jax.devices()[:1])
    params, count = setup.initial_params(0), 1 if name == "alone" else 10
    index = visits(config, setup.visited, 0, count)
    table = put_table(setup)
    key, numbers = jax.random.key(0), (jnp.int32(count), jnp.int32(1))
    if name in ("alone", "program"):
        state = setup.compiled.start(params)
        weights, iterate = (jnp.float32(1.0), jnp.float32(config.optimizer.learning_rate)), setup.compiled.iterate
        assert iterate is not None

        def run() -> Any:
            mine = jax.tree.map(jnp.copy, state)
            return iterate(mine, params, table, index, numbers[0], key, numbers[1], *weights)

        return {"form": name, "devices": 1} | clocked(run, count)
    mesh = make_sweep_mesh(POINTS)
    functions = make_sweep_functions(setup.recipe, mesh, batch_samples=64, batched=name == "batched")
    whole, spread = NamedSharding(mesh, WHOLE), NamedSharding(mesh, SPREAD)
    references, table = jax.device_put((jax.tree.map(lambda x: np.asarray(x)[None], params), table), whole)
    betas = jax.device_put(np.geomspace(*BETAS, POINTS, dtype=np.float32)[None], spread)
    rates = jax.device_put(np.full((1, POINTS), config.optimizer.learning_rate, np.float32), spread)
    keys = jax.random.wrap_key_data(jax.device_put(np.asarray(jax.random.key_data(key))[None], whole))
    states = functions.start(references, betas)

    def run_all() -> Any:
        mine = jax.tree.map(jnp.copy, states)
        return functions.iterate(mine, references, keys, index[None], table, *numbers, betas, rates)

    return {"form": name, "devices": mesh.size} | clocked(run_all, count * POINTS)


def clocked(run: Callable[[], Any], parts: int) -> dict[str, float]:
    """Milliseconds of a part of a call, and seconds until the first call was done."""
    import jax

    begun = time.monotonic()
    jax.block_until_ready(run())
    first, wall, busy = time.monotonic() - begun, [], []
    for _ in range(5):
        begun, used = time.monotonic(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.monotonic() - begun)
        busy.append(time.process_time() - used)
    milliseconds = {name: 1e3 * statistics.median(x) / parts for name, x in (("wall", wall), ("cpu", busy))}
    return milliseconds | {"first": first}


def read_config(path: str) -> Any:
    """The config of a file, with --quick made tiny."""
    import importlib

    config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()
    if flags.FLAGS.quick:
        config.update_from_flattened_dict(QUICK)
    return config


def table(numbers: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    singles = statistics.mean(numbers["singles"])
    lines = ["| what | cold, s | warm, s |", "|---|---|---|"]
    lines.append(f"| one run | {numbers['single_cold']:.1f} | {singles:.1f} |")
    lines.append(f"| sweep of {numbers['points']} β | {numbers['sweep_cold']:.1f} | {numbers['sweep']:.1f} |")
    lines.append(f"| sweep, as a share of {numbers['points']} runs | | {numbers['ratio']:.2f} |")
    lines += [
        "",
        "| one iteration of one point | devices | wall, ms | CPU, ms | first call, s |",
        "|---|---|---|---|---|",
    ]
    names = {
        "alone": "single run, one iteration per program",
        "program": "single run, ten",
        "points": "16 points, one after the other",
        "batched": "16 points, batched",
    }
    for x in numbers["iteration"]:
        lines.append(f"| {names[x['form']]} | {x['devices']} | {x['wall']:.1f} | {x['cpu']:.1f} | {x['first']:.1f} |")
    return "\n".join(lines)


def define_flags() -> None:
    """What the functions above read."""
    flags.DEFINE_string("config", "configs/small.py", "Config file, as for launch.py.")
    flags.DEFINE_integer("singles", 2, "Warm single runs that are timed.", lower_bound=1)
    flags.DEFINE_string("out", "runs/benchmarks", "Where sweep.json goes.")
    flags.DEFINE_bool("quick", False, "A tiny decoder and seven iterations.")
    flags.DEFINE_enum("form", None, ["alone", "program", "points", "batched"], "For the processes it starts itself.")


if __name__ == "__main__":
    define_flags()
    app.run(main)

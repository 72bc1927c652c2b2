"""The benchmark of accelerators: its counts, its reading of programs and traces, and that our programs lower for CUDA and TPU."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import accelerator, compiled, limits, operations, programs, traffic
from experiments.benchmarks.limits import H200, Work
from experiments.benchmarks.programs import SIZES, WORKS, Setting
from grpo_jax.models import param_shapes

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = Setting("tiny", 32, prompt=16, completion=32, mean=12, microbatch=512)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size):
    config = programs.decoder(Setting(size, 16))
    matrices = [x.size for x in jax.tree.leaves(param_shapes(config)) if x.ndim == 3 or x.shape[0] == config.vocab_size]
    assert limits.layer_parameters(config) + limits.head_parameters(config) == sum(matrices)


@pytest.mark.parametrize(
    ("size", "tokens_per_second", "update_seconds", "state_gib"),
    [("0.5B", (196e3, 416e3), 2.1, 7.4), ("1.5B", (68e3, 158e3), 6.5, 23.0)],
)
def test_limits_are_those_computed_by_hand(size, tokens_per_second, update_seconds, state_gib):
    for rows, expected in zip((64, 256), tokens_per_second, strict=True):
        setting = Setting(size, rows)
        config, work = programs.decoder(setting), setting.work
        assert work.tokens / limits.rollout_seconds(config, work, H200) == pytest.approx(expected, rel=0.03)
    config, work = programs.decoder(Setting(size, 512)), Setting(size, 512).work
    assert limits.update_flops(config, work) / H200.flops == pytest.approx(update_seconds, rel=0.02)
    assert limits.held_bytes(config) / 2**30 == pytest.approx(state_gib, rel=0.01)


def test_steps_are_counted_row_by_row():
    config, lengths = programs.decoder(TINY), np.array([[3, 1], [2, 5]])
    moved, computed = limits.decode_steps(config, Work(lengths, prompt=7))
    layers, width, heads, kv_heads, head_dim, d_ff, vocabulary = SIZES["tiny"]
    weights = layers * width * (head_dim * (2 * heads + 2 * kv_heads) + 3 * d_ff) + vocabulary * width
    for step in range(1, 5):
        read, done = 2 * weights, 0
        for group in lengths:
            alive = [n for n in group if n > step]
            slots = step * len(alive) + 7 * bool(alive)
            read += slots * layers * kv_heads * head_dim * 2 * 2
            done += len(alive) * (2 * weights + layers * heads * head_dim * (step + 7) * 4)
        assert moved[step - 1] == read
        assert computed[step - 1] == done


def test_flops_of_an_update_are_those_of_its_products():
    """Of the forward pass as XLA counts it, one prompt and one completion, layers unrolled."""
    setting = Setting("tiny", 1, group=1, prompt=64, completion=64)
    config = programs.decoder(setting)
    counted = limits.update_flops(config, Work(np.array([[64]]), 64)) / 3
    # Attention by hand sees only what it may; XLA multiplies with the whole square, twice as much.
    layers, width, heads, kv_heads, head_dim, d_ff, vocabulary = SIZES["tiny"]
    x, w = jnp.zeros((128, width)), jnp.zeros((width, head_dim * (2 * heads + 2 * kv_heads) + 3 * d_ff))
    flops = layers * jax.jit(jnp.dot).lower(x, w).compile().cost_analysis()["flops"]
    flops += jax.jit(jnp.dot).lower(x[:64], jnp.zeros((width, vocabulary))).compile().cost_analysis()["flops"]
    attention = layers * 4 * heads * head_dim * sum(range(1, 129))
    assert counted == pytest.approx(flops + attention, rel=1e-6)


def test_geometric_lengths_end_with_the_chance_they_say():
    lengths = limits.geometric_lengths(1000, 16, 64.0, 10_000)
    assert lengths.mean() == pytest.approx(64, rel=0.03)
    assert (lengths == 1).mean() == pytest.approx(1 / 64, rel=0.2)
    assert limits.geometric_lengths(10, 16, 64.0, 8).max() == 8


def _moved(function, *arguments, donate=()):
    return traffic.loops(jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text())


def test_traffic_of_known_programs():
    x, table = jnp.ones((256, 1024)), jnp.ones((512, 256, 1024))
    (program,) = _moved(lambda x: x + 1, x)
    assert program.moved == 2 * x.nbytes
    # A loop of known length counts as often as it runs; a slice counts as the slice and not as what it is cut from.
    (program,) = _moved(lambda x, t: jax.lax.fori_loop(0, 8, lambda i, x: x + t[i], x), x, table)
    assert 8 * 3 * x.nbytes <= program.moved <= 8 * 3.2 * x.nbytes + 4 * x.nbytes
    # A written slice counts as what is written.
    write = lambda t, i: jax.lax.dynamic_update_slice(t, jnp.full((1, 256, 1024), 2.0), (i, 0, 0))  # noqa: E731
    assert _moved(write, table, jnp.int32(3), donate=(0,))[0].moved < 4 * x.nbytes


def test_loops_of_unknown_length_are_told_apart():
    x = jnp.ones((256, 1024))

    def run(x, n):
        y = jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] * 2), (jnp.int32(0), x))[1]
        step = lambda i, z: jax.lax.fori_loop(0, 3, lambda j, z: jnp.sin(z), z)  # noqa: E731
        return jax.lax.fori_loop(0, n, step, y)

    found = {round(loop.moved / x.nbytes) for loop in _moved(run, x, jnp.int32(5)) if loop.name != "program"}
    assert found == {2, 6}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("work", WORKS)
def test_programs_lower_for_accelerators_that_are_not_there(work, platform):
    function, shapes = programs.build(work, TINY)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        text = function.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text
    assert "cpu" not in text.replace("cpu_", "")  # no call of a library of the CPU's
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert any("bf16" in line for line in products)


@pytest.mark.parametrize("work", ["sampling", "update"])
def test_arguments_are_those_of_the_program(work):
    _, shapes = programs.build(work, TINY)
    given = jax.eval_shape(lambda: programs.arrays(work, TINY))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), given) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_a_trace_names_the_operations_that_take_the_time(tmp_path):
    x = jnp.ones((512, 512))
    product = jax.jit(lambda x: jnp.sin(x @ x @ x))
    jax.block_until_ready(product(x))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(product(x))
    found = operations.operations(tmp_path)
    assert found
    assert any("dot" in name for name, _ in found[:2])
    assert found == sorted(found, key=lambda row: -row[1])
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        operations.operations(tmp_path / "none")


def test_a_case_that_fails_is_reported_and_the_others_go_on():
    form = accelerator.Form("ours", (sys.executable, "-c", "raise SystemExit('no memory left')"))
    row = accelerator.measure(form, {"work": "sampling", **TINY._asdict()}, H200, 1)
    assert "no memory left" in row["refused"]
    assert "not run: " in accelerator.table([row])


@pytest.mark.slow
def test_the_command_measures(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator", "--size=tiny", "--rows=16", "--prompt=8"]
    command += ["--completion=8", "--mean=4", "--works=sampling", "--lengths=ragged", f"--out={tmp_path}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    command += ["--repeats=2", "--profile"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout
    device, row = json.loads((tmp_path / "accelerator.json").read_text(encoding="utf-8"))["rows"]
    assert device["flops"] > 0
    assert 0 < row["share"]["median"] < 1  # no program is faster than its limit
    assert row["tokens_per_second"]["low"] <= row["tokens_per_second"]["median"]
    assert row["compile_cached"] < row["compile_cold"]
    assert row["operations"]
    assert "| operation | ms | share |" in printed


def test_examples():
    for module in (accelerator, compiled, limits, operations, programs, traffic):
        assert doctest.testmod(module).failed == 0

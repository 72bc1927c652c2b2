"""What is read from the programs of accelerators' compilers: traffic, passes of loops, and ratios that must not become worse."""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import compiled, limits, programs, traffic
from experiments.benchmarks.programs import Setting
from grpo_jax.models import init_params, make_policy
from grpo_jax.rollout import sample_groups
from grpo_jax.rollout.compaction import choose_stages
from tests.pods import ROOT, environment

TINY = Setting("tiny", 32, prompt=8, completion=64, mean=12, microbatch=512, ragged=True)

# A loop of 24 passes as a TPU's compiler writes it: weights come to the chip in two slices, one asynchronous, beside a product.
TPU = """
HloModule jit_f, is_scheduled=true

%fused_product (p.0: bf16[8,256], p.1: bf16[256,128]) -> bf16[8,128] {
  %p.0 = bf16[8,256]{1,0~S(1)} parameter(0)
  %p.1 = bf16[256,128]{1,0~S(1)} parameter(1)
  ROOT %convolution.1 = bf16[8,128]{1,0~} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%fused_write (p.2: bf16[24,8,128], p.3: bf16[8,128], p.4: s32[]) -> bf16[24,8,128] {
  %p.2 = bf16[24,8,128]{2,1,0~} parameter(0)
  %p.3 = bf16[8,128]{1,0~S(1)} parameter(1)
  %p.4 = s32[] parameter(2)
  %bitcast.1 = bf16[1,8,128]{2,1,0~} bitcast(%p.3)
  ROOT %dynamic-update-slice.1 = bf16[24,8,128]{2,1,0~} dynamic-update-slice(%p.2, %bitcast.1, %p.4)
}

%body (carry: (s32[], bf16[512,128], bf16[24,8,128])) -> (s32[], bf16[512,128], bf16[24,8,128]) {
  %carry = (s32[], bf16[512,128]{1,0~}, bf16[24,8,128]{2,1,0~}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %weights = bf16[512,128]{1,0~} get-tuple-element(%carry), index=1
  %out = bf16[24,8,128]{2,1,0~} get-tuple-element(%carry), index=2
  %slice-start.1 = ((bf16[512,128]{1,0~}), bf16[256,128]{1,0~S(1)}, s32[]{:S(2)}) slice-start(%weights), slice={[0:256], [0:128]}
  %broadcast.1 = bf16[8,256]{1,0~S(1)} broadcast(%i), dimensions={}
  %slice-done.1 = bf16[256,128]{1,0~S(1)} slice-done(%slice-start.1)
  %fusion.1 = bf16[8,128]{1,0~S(1)} fusion(%broadcast.1, %slice-done.1), kind=kOutput, calls=%fused_product
  %fusion.2 = bf16[24,8,128]{2,1,0~} fusion(%out, %fusion.1, %i), kind=kLoop, calls=%fused_write
  %one = s32[] constant(1)
  %add.1 = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %tuple.1 = (s32[], bf16[512,128]{1,0~}, bf16[24,8,128]{2,1,0~}) tuple(%add.1, %weights, %fusion.2)
}

%condition (carry.1: (s32[], bf16[512,128], bf16[24,8,128])) -> pred[] {
  %end = s32[] constant(24)
  %carry.1 = (s32[], bf16[512,128]{1,0~}, bf16[24,8,128]{2,1,0~}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (w: bf16[512,128], o: bf16[24,8,128], y: f32[3,100]) -> (bf16[24,8,128], f32[3,100]) {
  %w = bf16[512,128]{1,0~} parameter(0)
  %o = bf16[24,8,128]{2,1,0~} parameter(1)
  %y = f32[3,100]{1,0:T(8,128)} parameter(2)
  %zero = s32[] constant(0)
  %first = s32[] copy(%zero)
  %tuple.2 = (s32[], bf16[512,128]{1,0~}, bf16[24,8,128]{2,1,0~}) tuple(%first, %w, %o)
  %while.1 = (s32[], bf16[512,128]{1,0~}, bf16[24,8,128]{2,1,0~}) while(%tuple.2), condition=%condition, body=%body
  %result = bf16[24,8,128]{2,1,0~} get-tuple-element(%while.1), index=2
  %copy-start.1 = (f32[3,100]{1,0:T(8,128)S(1)}, f32[3,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done.1 = f32[3,100]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %negate.1 = f32[3,100]{1,0:T(8,128)} negate(%copy-done.1)
  ROOT %tuple.3 = (bf16[24,8,128]{2,1,0~}, f32[3,100]{1,0:T(8,128)}) tuple(%result, %negate.1)
}
""".replace("~", ":T(8,128)(2,1)")


def test_traffic_of_a_tpu_is_that_of_its_memory():
    """Of the weights only the slice that is read, of the output only what is written, full tiles, and nothing of the chip's."""
    (program,) = traffic.loops(TPU)
    moved = dict(program.movers)
    assert moved["slice-done bf16[256,128]"] == 24 * 256 * 128 * 2
    assert moved["fusion bf16[24,8,128]"] == 24 * (8 * 128 * 2 + 4)  # and the counter
    assert moved["copy-done f32[3,100]"] == moved["negate f32[3,100]"] == 8 * 128 * 4
    assert moved["fusion bf16[8,128]"] == 0
    assert traffic.products(TPU) == {"bf16 · bf16": 1}
    assert traffic.arrays(TPU)[0] == ("bf16[512,128]", [512, 128], 2 * 512 * 128)


def test_the_passes_of_a_counter_are_known():
    assert len(traffic.loops(TPU)) == 1
    unknown = TPU.replace("compare(%j, %end), direction=LT", "compare(%j, %end), direction=NE")
    program, inside = traffic.loops(unknown)
    assert inside.moved == 256 * 128 * 2 + 8 * 128 * 2 + 4 * 4 and program.moved < inside.moved


def test_a_kernel_moves_what_it_says():
    call = '%negate.1 = f32[3,100]{1,0:T(8,128)} custom-call(%w, %copy-done.1), custom_call_target="tpu_custom_call", '
    call += 'metadata={op_name="jit(f)/kernel_of_4321_bytes/attend_to_cache"}'
    text = TPU.replace("%negate.1 = f32[3,100]{1,0:T(8,128)} negate(%copy-done.1)", call)
    assert dict(traffic.loops(text)[0].movers)["negate f32[3,100] · kernel_of_4321_bytes/attend_to_cache"] == 4321


def test_steps_are_counted_in_the_loop_that_makes_them():
    config = programs.decoder(TINY)
    policy, params = make_policy(config), init_params(config, jax.random.key(0))
    prompts = programs.arrays("sampling", TINY)[1]
    options = {"group_size": TINY.group, "max_completion": TINY.completion, "stop_ids": tuple(range(42))}
    rollout = jax.jit(partial(sample_groups, policy, **options))(params, prompts, jax.random.key(1))
    lengths = np.array(rollout.mask.sum(-1))
    passes = compiled.decoding_passes(lengths, choose_stages(lengths.size, TINY.completion))
    assert len({rows for rows, _ in passes}) > 2
    assert sorted(itertools.chain(*passes.values())) == list(range(1, lengths.max()))
    work = lengths.size + sum(rows * len(positions) for (rows, _), positions in passes.items())
    assert float(rollout.useful) == pytest.approx(lengths.sum() / work, rel=1e-6)


def test_what_is_read_of_a_program_of_this_machine():
    row, (program, *inside) = compiled.read("sampling", TINY, "here")
    stages = [stage for stage in map(compiled.decoding_stage, inside) if stage]
    assert sorted(stages) == sorted((s.rows, slots) for s in choose_stages(32, 64) for slots in s.slots)
    assert row["fits"] and min(row["ratios"].values()) > 0.8 and program.moved > 0
    assert row["ratios"]["steps"] > 1  # no program moves less than what must move
    assert compiled.case(row) in compiled.table([row])
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        update, _ = compiled.read("update", TINY, "here")
    assert update["moved_seconds"] > 0 and update["square"].startswith("f32[16,2,1,2,64,64]")


def test_bytes_of_all_that_exists_are_counted_by_hand():
    config = programs.decoder(TINY)
    load = limits.Work(np.full((2, 16), 64), 8)
    parameters = limits.layer_parameters(config) + limits.head_parameters(config)
    slots = 2 * (16 * 64 + 8)
    assert limits.rollout_bytes(config, load, 2) == 4 * parameters // 2 + 2 * parameters + 2 * 2 * 2 * 2 * 16 * slots


def test_a_target_without_its_compiler_is_one_line(tmp_path):
    target = next(
        (t for t, package in (("v5e", "libtpu"), ("H200", "jax_cuda13_plugin")) if find_spec(package) is None), None
    )
    if target is None:
        pytest.skip("both compilers are here")
    command = [sys.executable, "-m", "experiments.benchmarks.compiled", f"--target={target}", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(1), timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"--target={target}: ") and "pip install" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install libtpu")
def test_sampling_and_update_on_a_tpu_have_not_become_worse(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.compiled", "--target=v5e", "--size=0.5B", "--rows=64"]
    command += ["--works=sampling,update", "--lengths=fixed", "--check", f"--out={tmp_path}"]
    subprocess.run(command, check=True, cwd=ROOT, env=dict(os.environ), timeout=600)
    sampling, update = json.loads((tmp_path / "compiled_v5e.json").read_text())["rows"]
    assert sampling["fits"] and sampling["ratios"]["steps"] < 1.2  # of all slots, only what is filled
    assert update["fits"] and "[16,1024,1024]" in (
        update["square"] or "[16,1024,1024]"
    )  # which keys are seen, no scores


def test_a_loop_that_reads_a_slice_reads_no_more():
    """As this machine's compiler fuses it, whatever is nested in what."""
    table, x = jnp.ones((512, 64, 1024)), jnp.ones((64, 1024))
    step = lambda i, x: jnp.tanh(x * jax.lax.dynamic_index_in_dim(table, i % 512, keepdims=False)) + x  # noqa: E731
    text = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, step, x)).lower(3, x).compile().as_text()
    largest = max(traffic.loops(text), key=lambda loop: loop.moved * (loop.name != "program"))
    assert largest.moved <= 4.1 * x.nbytes

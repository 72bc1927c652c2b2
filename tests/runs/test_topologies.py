"""Programs compiled for TPUs that are not there, by their own compiler; and what is read from compilers' texts."""

import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest

from grpo_jax.runs import memory
from grpo_jax.runs.memory import Memory, Program, advice, format_bytes
from grpo_jax.runs.topologies import collectives, out_of_memory, topology_devices
from tests.pods import ROOT, environment
from tests.tiny_run import flags, tiny_config

has_compiler = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU's compiler: pip install libtpu")


def test_collectives_are_counted_with_the_bytes_of_their_results():
    text = """
      %all-gather.1 = bf16[8,128]{1,0} all-gather(%p), dimensions={0}
      %all-gather-start.2 = (f32[4]{0}, f32[16]{0}) all-gather-start(%q), dimensions={0}
      %all-gather-done.2 = f32[16]{0} all-gather-done(%all-gather-start.2)
      ROOT %all-reduce = (f32[], s32[3]{0}) all-reduce(%a, %b), to_apply=%add
      %add.3 = f32[8] add(%x, %y)
    """
    assert collectives(text) == {"all-gather": (2, 8 * 128 * 2 + 64), "all-reduce": (1, 4 + 12)}


def test_the_bytes_of_a_program_that_is_too_large_are_read():
    compiler = "RESOURCE_EXHAUSTED: E1000: … the total memory required for HLO temporaries (447.18G) exceeds HBM."
    assert out_of_memory(RuntimeError(compiler)) == int(447.18 * 2**30)
    assert out_of_memory(RuntimeError("INTERNAL: (2.0G) exceeds")) is None
    assert out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of luck")) is None


def program(adds, fits=True):
    return Program(adds, fits, 1.0, {})


def test_advice_names_what_does_not_fit_and_keys_that_help():
    config, gib = tiny_config(), 2**30
    fits = Memory({"parameters": gib}, {"update": gib}, {"update": program(gib)})
    assert advice(config, fits, 3.0 * gib, 8) == "fits: 2.0 GiB of 3.0 GiB per device"
    assert "not known" in advice(config, fits, None, 8)
    large = advice(config, Memory({"parameters": 4 * gib}, {"update": gib}, {"update": program(gib)}), 3.0 * gib, 8)
    assert "--config.mesh.fsdp=2" in large
    update = advice(
        config, Memory({"parameters": gib}, {"update": 9 * gib}, {"update": program(9 * gib, False)}), 3.0 * gib, 8
    )
    assert "update 10.0 GiB" in update
    assert "--config.train.microbatch_tokens=16384" in update and "--config.model.remat=full" in update
    rollout = advice(
        config, Memory({"parameters": gib}, {"rollout": 9 * gib}, {"rollout": program(9 * gib)}), 3.0 * gib, 8
    )
    assert f"rollout {format_bytes(10 * gib)}" in rollout and "--config.mesh.tensor=2" in rollout
    config.mesh.fsdp = 4
    memory = Memory({"parameters": gib}, {"rollout": 9 * gib}, {"rollout": program(9 * gib)})
    assert "--config.model.gather=layer" in advice(config, memory, 3.0 * gib, 8)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "h200", "2*h200:8x"])
def test_hardware_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="must be like v5e:4x4"):
        topology_devices(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="the TPU's compiler is here")
def test_without_its_compiler_it_is_said_how_to_get_it():
    with pytest.raises(ValueError, match=r"--topology=v5e:2x2: .* pip install 'jax\[tpu\]'"):
        topology_devices("v5e:2x2")


def test_a_program_that_is_too_large_is_said_to_be(monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: (2.00G) exceeds available HBM")

    assert memory._build(Lowered(), 2**30)._replace(seconds=0.0) == Program(2**30, False, 0.0, {})


def estimate(*more: str) -> str:
    command = [sys.executable, "launch.py", "--config=configs/default.py", "--mode=estimate", *flags(), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@has_compiler
@pytest.mark.slow
def test_a_tpu_compiles_the_programs_of_a_run_for_one_slice_and_for_two():
    one = estimate("--topology=v5e:2x2")
    assert "compiling for 4 × TPU v5 lite" in one and "fits: " in one and "all-reduce" in one
    two = estimate("--topology=2*v5e:2x2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert "compiling for 8 × TPU v5 lite" in two and "fits: " in two and "all-gather" in two


@has_compiler
def test_the_mesh_of_two_slices_keeps_weights_within_one():
    from grpo_jax.train.sharding import make_mesh

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topology_devices("2*v5e:2x2")
    mesh = make_mesh(fsdp=2, tensor=2, devices=devices)
    for i in range(2):
        assert {device.slice_index for device in mesh.devices[i].ravel()} == {i}
    with pytest.raises(ValueError, match="not a multiple of the 2 slices"):
        make_mesh(fsdp=8, devices=devices)

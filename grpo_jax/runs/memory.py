"""What a run needs of each device's memory, known before anything is allocated: its programs are compiled for shapes alone."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from grpo_jax.config import validate
from grpo_jax.models import make_policy, param_shapes
from grpo_jax.objective import Objective
from grpo_jax.rollout import PromptBatch, Rollout
from grpo_jax.rollout.compaction import Stage, choose_stages
from grpo_jax.runs.errors import RunError
from grpo_jax.runs.run import show
from grpo_jax.runs.setup import make_decoder
from grpo_jax.tasks import Task
from grpo_jax.train.compiled import Bound, make_functions, make_optimizer
from grpo_jax.train.sharding import make_mesh, replicated, row_sharding, row_shards, sharded_shapes
from grpo_jax.train.step import init_state


class Memory(NamedTuple):
    """Bytes per device.

    Attributes:
      held: of what stays for all iterations, by name: parameters, optimizer, and the reference where the objective has a KL
        to it.
      working: of what a program adds while it runs, by name; only one runs at a time.
    """

    held: dict[str, int]
    working: dict[str, int]

    @property
    def peak(self) -> int:
        """All that is held, and the most that a program adds."""
        return sum(self.held.values()) + max(self.working.values(), default=0)


def estimate(config: Any, console: Console | None = None) -> Memory:
    """Prints what a run of this config would hold and need on each device, without weights or a run directory.

    Raises ConfigError for a config that cannot run.
    """
    console = console or Console()
    task, objective = validate(config, num_devices=jax.device_count())
    names = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    console.print(f"compiling for {names}; nothing is allocated", markup=False, highlight=False)
    memory = estimate_memory(config, task, objective)
    show(console, memory_table(memory))
    return memory


def held_memory(config: Any, objective: Objective, shapes: Any, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Bytes per device of parameters, optimizer state and the reference, if one is kept, from shapes with shardings."""
    optimizer = make_optimizer(config, config.optimizer.learning_rate)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), shapes)
    parameters = per_device(shapes)
    held = {"parameters": parameters, "optimizer": per_device(sharded_shapes(state, mesh)) - parameters}
    return held | ({"reference": parameters} if objective.holds_to_reference else {})


def estimate_memory(config: Any, task: Task, objective: Objective) -> Memory:
    """What XLA says each program of a validated config needs, on the devices of this process.

    Prompts count as data.max_prompt tokens. The programs are those of this backend: on CPU devices that stand for others
    (``--devices``), buffers are those of XLA's CPU compiler, near those of an accelerator but not the same.
    """
    mesh = make_mesh(**config.mesh)
    decoder = make_decoder(config, task)
    shapes = sharded_shapes(param_shapes(decoder), mesh)
    bound = Bound(make_policy(decoder), stop_ids=(0,), pad_id=0, stop_table=None, verify_tokens=None)
    functions = make_functions(config, objective, bound, shapes, mesh)
    rows, whole = row_sharding(mesh), replicated(mesh)
    prompts_number, width, length = (
        config.data.prompts_per_iteration,
        config.data.max_prompt,
        config.rollout.max_completion,
    )

    if width + length > decoder.max_length:
        raise ValueError(
            f"data.max_prompt={width} and rollout.max_completion={length} tokens are more than the model's "
            f"{decoder.max_length}"
        )

    def array(*shape: int, dtype: Any = jnp.int32, sharding: Any = rows) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompts = PromptBatch(array(prompts_number, width), array(prompts_number, width, dtype=bool), array(prompts_number))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def first_stages(group_size: int) -> tuple[Stage, ...]:
        """Of a rollout: the two largest need as much memory as all, which take minutes to compile for deep models."""
        stages = choose_stages(prompts_number // row_shards(mesh, prompts_number) * group_size, length)
        return tuple(Stage(stage.rows, (length,)) for stage in stages[:2])

    def rollout(group_size: int) -> Rollout:
        shape = (prompts_number, group_size, length)
        return Rollout(
            array(*shape),
            array(*shape, dtype=bool),
            array(*shape, dtype=jnp.float32),
            array(*shape[:2], dtype=bool),
            useful=array(dtype=jnp.float32, sharding=whole),
        )

    state = sharded_shapes(jax.eval_shape(functions.start, shapes), mesh)
    group_size = config.rollout.group_size
    rewards, number = array(prompts_number, group_size, dtype=jnp.float32), array(dtype=jnp.float32, sharding=whole)
    reference = shapes if objective.holds_to_reference else None
    probed = min(config.evaluate.batch_samples, max(config.evaluate.samples, config.evaluate.final_samples))
    programs = {
        "rollout": functions.sample.lower(shapes, prompts, key, stages=first_stages(group_size)),
        "update": functions.improve.lower(state, reference, prompts, rollout(group_size), rewards, key, number, number),
        "probe, sampling": functions.draw.lower(
            shapes,
            prompts,
            key,
            group_size=probed,
            greedy=False,
            first_sample=array(sharding=whole),
            stages=first_stages(probed),
        ),
    }
    if objective.holds_to_reference:
        programs["probe, KL"] = functions.sequence_kl.lower(shapes, shapes, prompts, rollout(probed))
    held = held_memory(config, objective, shapes, mesh)
    return Memory(held, {name: _working(lowered) for name, lowered in programs.items()})


def check_memory(held: dict[str, int]) -> None:
    """RunError where a device that tells its size is smaller than what a run holds all the time, by name."""
    limit, needed = (jax.devices()[0].memory_stats() or {}).get("bytes_limit"), sum(held.values())
    if limit is not None and needed > limit:
        raise RunError(
            f"{', '.join(held)} need {binary(needed)} per device, which has {binary(limit)}: "
            "spread them with --config.mesh.fsdp=N over more devices, or take a smaller model"
        )


def per_device(tree: Any) -> int:
    """Bytes of one device's share of a tree of ``ShapeDtypeStruct`` with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_table(memory: Memory) -> list[tuple[str, str]]:
    """(what, bytes) lines."""
    lines = [(name, binary(size)) for name, size in memory.held.items()]
    lines += [(f"{name} adds", binary(size)) for name, size in memory.working.items()]
    return [*lines, ("peak per device", binary(memory.peak))]


def binary(size: int) -> str:
    """Bytes in a unit that people read.

    >>> binary(1536), binary(5 << 30)
    ('1.5 KiB', '5.0 GiB')
    """
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _working(lowered: Any) -> int:
    found = lowered.compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes

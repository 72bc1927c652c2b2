"""What a run needs of each device's memory, known before anything is allocated: its programs are compiled for shapes alone."""

import math
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from grpo_jax.config import validate
from grpo_jax.models import param_shapes
from grpo_jax.objective import Objective
from grpo_jax.report.progress import progress
from grpo_jax.rollout import PromptBatch, Rollout
from grpo_jax.rollout.compaction import Stage, choose_stages
from grpo_jax.runs.errors import RunError
from grpo_jax.runs.run import say, show
from grpo_jax.runs.setup import make_compiled, make_decoder, make_recipe, trained_shapes
from grpo_jax.runs.topologies import CAPACITY, collectives, out_of_memory, topology_devices
from grpo_jax.tasks import Task
from grpo_jax.train import scores
from grpo_jax.train.iteration import Recipe
from grpo_jax.train.optimizer import Average
from grpo_jax.train.sharding import make_mesh, replicated, row_sharding, row_shards, sharded_shapes
from grpo_jax.train.step import init_state

OF_A_TOKEN = 13  # bytes of a completion: its id, its log-prob, its mask and its entropy


class Program(NamedTuple):
    """What its compiler says of a program.

    Attributes:
      adds: bytes per device beside what lasts, while it runs.
      fits: the compiler found room for it.
      seconds: of compiling.
      transfers: {name: (number, bytes)} of its collective operations, see `collectives`.
    """

    adds: int
    fits: bool
    seconds: float
    transfers: dict[str, tuple[int, int]]


class Memory(NamedTuple):
    """Bytes per device.

    Attributes:
      lasting: of what stays for all iterations, by name: parameters, optimizer, the average where one is kept, and the reference
        where it is read.
      working: of what a program adds while it runs, by name; only one runs at a time.
      programs: what was compiled to know, by name.
    """

    lasting: dict[str, int]
    working: dict[str, int]
    programs: dict[str, Program] = {}  # noqa: RUF012  # of a NamedTuple, which nobody changes

    @property
    def peak(self) -> int:
        """All that lasts, and the most that a program adds."""
        return sum(self.lasting.values()) + max(self.working.values(), default=0)


def estimate(config: Any, console: Console | None = None, *, topology: str | None = None) -> Memory:
    """Prints what a run of this config would need on each device, without weights or a run directory.

    Args:
      config: as for `train`.
      console: where it prints.
      topology: of accelerators that need not be there, see `topology_devices`; None: the devices of this process.

    Raises:
      ConfigError: a config that cannot run.
      ValueError: as of `topology_devices`.
    """
    console = console or Console()
    devices = jax.devices() if topology is None else topology_devices(topology)
    task, objective = validate(config, num_devices=len(devices))
    say(console, f"compiling for {len(devices)} × {devices[0].device_kind}; nothing is allocated")
    memory = estimate_memory(config, task, objective, devices=devices, console=console)
    show(console, memory_table(memory))
    if topology is not None:
        show(console, program_table(memory))
        say(console, advice(config, memory, CAPACITY.get(devices[0].device_kind), len(devices)))
    return memory


def lasting_memory(recipe: Recipe, shapes: Any, trained: Any, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Bytes per device of what is trained, optimizer state, and what else is kept of an average and the reference, from shapes
    with shardings.
    """
    state = jax.eval_shape(lambda params: init_state(params, recipe.optimizer(0.0)), trained)
    parameters = per_device(trained)
    lasting = {"parameters": parameters, "optimizer": per_device(sharded_shapes(state, mesh)) - parameters}
    if isinstance(state.opt_state[-1], Average):
        lasting |= {"optimizer": lasting["optimizer"] - parameters, "average": parameters}
    return lasting | ({"reference": per_device(shapes)} if recipe.needs_reference else {})


def estimate_memory(
    config: Any,
    task: Task,
    objective: Objective,
    *,
    devices: list[Any] | None = None,
    console: Console | None = None,
) -> Memory:
    """What XLA says the programs of training and measuring need, with the verifier on the host, for a validated config.

    With a verifier on the device, sampling and learning are one program; here they are two. Prompts count as data.max_prompt
    tokens. The programs are those of the compiler of ``devices``: on CPU devices that stand for others (``--devices``), buffers
    are near those of an accelerator but not the same.
    """
    # The model and its programs, without tokenizer or weights.
    mesh, c = make_mesh(**config.mesh, devices=devices), config.evaluate
    decoder = make_decoder(config, task, mesh)
    shapes = sharded_shapes(param_shapes(decoder), mesh)
    trained = trained_shapes(config, shapes, mesh)
    recipe = make_recipe(config, objective, decoder, shapes, stop_ids=(0,), pad_id=0)
    compiled = make_compiled(config, recipe, shapes, mesh, trained=trained)
    rows, whole = row_sharding(mesh), replicated(mesh)
    num_prompts, group_size = config.data.prompts_per_iteration, config.rollout.group_size
    width, length = config.data.max_prompt, config.rollout.max_completion
    if width + length > decoder.max_length:
        raise ValueError(
            f"data.max_prompt={width} and rollout.max_completion={length} tokens are more than the model's "
            f"{decoder.max_length}"
        )

    # Their arguments, as shapes.
    def array(*shape: int, dtype: Any = jnp.int32, sharding: Any = rows) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    prompts = PromptBatch(array(num_prompts, width), array(num_prompts, width, dtype=bool), array(num_prompts))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def first_stages(group_size: int) -> tuple[Stage, ...]:
        """Of a rollout only the two largest: they need as much memory as all, and all take minutes to compile for deep models."""
        stages = choose_stages(num_prompts // row_shards(mesh, num_prompts) * group_size, length)
        return tuple(Stage(stage.rows, (length,)) for stage in stages[:2])

    def rollout(group_size: int) -> Rollout:
        shape = (num_prompts, group_size, length)
        return Rollout(
            array(*shape),
            array(*shape, dtype=bool),
            array(*shape, dtype=jnp.float32),
            array(*shape[:2], dtype=bool),
            useful=array(dtype=jnp.float32, sharding=whole),
        )

    state = sharded_shapes(jax.eval_shape(compiled.start, trained), mesh)
    policy = sharded_shapes(jax.eval_shape(recipe.params, trained, shapes), mesh)
    rewards, number = array(num_prompts, group_size, dtype=jnp.float32), array(dtype=jnp.float32, sharding=whole)
    reference = shapes if recipe.needs_reference else None
    probed = min(c.batch_samples, max(c.samples, c.final_samples))
    probe_options = {"group_size": probed, "greedy": False, "first_sample": array(sharding=whole)}

    # The programs, lowered for these shapes.
    programs = {
        "rollout": compiled.sample.lower(policy, prompts, key, stages=first_stages(group_size)),
        "update": compiled.learn.lower(state, reference, prompts, rollout(group_size), rewards, key, number, number),
        "probe, sampling": compiled.sample_probe.lower(
            policy, prompts, key, **probe_options, stages=first_stages(probed)
        ),
    }
    if objective.holds_to_reference:
        programs["probe, KL"] = compiled.log_ratios.lower(policy, shapes, prompts, rollout(probed))
    built, lasting = {}, lasting_memory(recipe, shapes, trained, mesh)
    read = per_device(policy)  # by programs other than the update
    with progress(console or Console(quiet=True), "programs", total=len(programs)) as line:
        for number, (name, lowered) in enumerate(programs.items(), start=1):
            built[name] = _build(lowered, sum(lasting.values()) if name == "update" else read)
            line.update(number, name)
    working = {name: program.adds for name, program in built.items()}
    if config.attainable.steps and objective.kl_direction == "reverse":
        # Before training, and so without the optimizer: a gradient, four trees like the parameters, and the factors.
        factors = jax.eval_shape(lambda p: scores.whitening(scores.moments(p), p), trained)
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(factors))
        beside = size + 5 * lasting["parameters"] - sum(lasting.values())
        working["R², about"] = max(0, working["update"] + beside)
    return Memory(lasting, working, built)


def check_memory(config: Any, lasting: dict[str, int]) -> None:
    """Raises RunError where a device, or this host, has less memory than what lasts or what an iteration samples needs."""
    devices = jax.local_devices()
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = host // len(devices) if devices[0].platform == "cpu" else None
    limit, needed = (devices[0].memory_stats() or {}).get("bytes_limit", shared), sum(lasting.values())
    if limit is not None and needed > limit:
        raise RunError(
            f"{', '.join(lasting)} need {format_bytes(needed)} per device, which has {format_bytes(limit)}: "
            "spread them with --config.mesh.fsdp=N over more devices, or take a smaller model"
        )
    c = config.rollout
    completions = config.data.prompts_per_iteration * c.group_size
    sampled = completions * c.max_completion * OF_A_TOKEN
    if sampled > host:
        raise RunError(
            f"{completions:,} completions of rollout.max_completion={c.max_completion} tokens take {format_bytes(sampled)} "
            f"of the host, which has {format_bytes(host)}: lower rollout.group_size or data.prompts_per_iteration"
        )


def per_device(tree: Any) -> int:
    """Bytes of one device's share of a tree of ``ShapeDtypeStruct`` with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_table(memory: Memory) -> list[tuple[str, str]]:
    """(what, bytes) lines."""
    lines = [(name, format_bytes(size)) for name, size in memory.lasting.items()]
    lines += [(f"{name} adds", format_bytes(size)) for name, size in memory.working.items()]
    return [*lines, ("peak per device", format_bytes(memory.peak))]


def format_bytes(size: int) -> str:
    """Bytes in a unit that people read.

    >>> format_bytes(1536), format_bytes(5 << 30)
    ('1.5 KiB', '5.0 GiB')
    """
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def program_table(memory: Memory) -> list[tuple[str, str]]:
    """(program, what its compiler says of it) lines."""
    lines = []
    for name, program in memory.programs.items():
        moved = [f"{number} {kind} {format_bytes(size)}" for kind, (number, size) in program.transfers.items()]
        transfers = "no collectives" if not moved else f"collectives, those of a loop once: {', '.join(moved)}"
        lines.append((name, f"compiled in {program.seconds:.0f} s; {transfers if program.fits else 'does not fit'}"))
    return lines


def advice(config: Any, memory: Memory, capacity: float | None, num_devices: int) -> str:
    """Whether it fits into ``capacity`` bytes per device, and if not, which keys would help."""
    if capacity is None:
        return "how much memory this device has is not known"
    lasting = sum(memory.lasting.values())
    needs = {name: size + lasting for name, size in memory.working.items()}
    refused = {name for name, program in memory.programs.items() if not program.fits}
    too_large = {name: size for name, size in needs.items() if size > capacity or name in refused}
    if lasting <= capacity and not too_large:
        return f"fits: {format_bytes(max(needs.values(), default=lasting))} of {format_bytes(int(capacity))} per device"
    spread = config.mesh.fsdp * config.mesh.tensor
    keys = []
    if lasting > capacity / 2 and spread < num_devices:
        keys.append(
            f"--config.mesh.fsdp={min(num_devices // config.mesh.tensor, 2 * config.mesh.fsdp)} spreads what lasts"
        )
    if "R², about" in too_large:
        keys.append("--config.attainable.steps=0 leaves out what the network lets through")
    if "update" in too_large:
        keys.append(
            f"--config.train.microbatch_tokens={config.train.microbatch_tokens // 2} makes the update's parts smaller"
        )
        if config.model.remat == "none":
            keys.append("--config.model.remat=full keeps less of each layer")
    if any(name.startswith(("rollout", "probe, sampling")) for name in too_large):
        if config.mesh.fsdp > 1 and config.model.gather == "model":
            keys.append("--config.model.gather=layer holds one layer whole to decode, and gathers it for every token")
        if config.mesh.tensor * 2 <= num_devices:
            keys.append(
                f"--config.mesh.tensor={2 * config.mesh.tensor} splits the weights of decoding, which fsdp gathers"
            )
        keys.append("fewer prompts at a time (--config.data.prompts_per_iteration, --config.evaluate.batch_samples)")
    if any(name.startswith("probe") for name in too_large):
        keys.append(
            f"--config.evaluate.batch_samples={max(1, config.evaluate.batch_samples // 2)} measures in smaller parts"
        )
    if config.model.dtype == "float32":
        keys.append("--config.model.dtype=bfloat16 halves activations and decoding's weights")
    over = (
        ", ".join(f"{name} {format_bytes(size)}" for name, size in too_large.items()) or f"all {format_bytes(lasting)}"
    )
    return "\n  - ".join([f"does not fit into {format_bytes(int(capacity))} per device: {over}", *keys])


def _build(lowered: Any, arguments: int) -> Program:
    """Compiles; ``arguments`` are the bytes per device of what lasts and is read, which a compiler that refuses counts in."""
    begun = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(error)
        if needed is None:
            raise
        return Program(max(0, needed - arguments), False, time.monotonic() - begun, {})
    sizes = compiled.memory_analysis()
    adds = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Program(adds, True, time.monotonic() - begun, collectives(compiled.as_text()))

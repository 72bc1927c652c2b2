"""The pure functions of a run with its config bound to them, and the same jitted and placed on a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Wrapped

from grpo_jax.data import PromptSet, prompt_batch
from grpo_jax.objective import LossTerms, Objective
from grpo_jax.rollout import Policy, PromptBatch, Rollout, sample_groups, score_groups
from grpo_jax.rollout.scoring import score_packed
from grpo_jax.train.iteration import iteration, update
from grpo_jax.train.sharding import ROWS, parameter_shardings, replicated, row_sharding, row_shards
from grpo_jax.train.step import TrainState, gradient_step, init_state


class Bound(NamedTuple):
    """What model, tokenizer and task give to the functions of a run.

    Attributes:
      policy: the model.
      stop_ids, pad_id, stop_table: see `sample_groups`.
      verify_tokens: (completions, mask, answers, answer_mask) -> bool [P, G]; None where the task verifies on the host only.
    """

    policy: Policy
    stop_ids: tuple[int, ...]
    pad_id: int
    stop_table: jax.Array | None
    verify_tokens: Callable[..., jax.Array] | None


class Pieces(NamedTuple):
    """What an iteration is made of: pure functions that know neither devices nor a mesh.

    Attributes:
      sample: (params, prompts, key, **options of `sample_groups`) -> rollout.
      improve: (state, ref_params, prompts, rollout, rewards, key, beta, learning_rate) -> (state, metrics).
      verify_tokens: as in `Bound`.
    """

    sample: Callable[..., Rollout]
    improve: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    verify_tokens: Callable[..., jax.Array] | None


class Functions(NamedTuple):
    """The jitted pieces of a run; they know shapes and sharding, not what the parameters are.

    Attributes:
      start: params -> `TrainState` of the GRPO optimizer; takes the parameters' memory where no reference is kept.
      iterate: `iterations` with everything bound but its arrays; None where the task verifies on the host only.
      sample, improve: the halves of an iteration, as in `Pieces`; sample may be told its stages.
      draw: ``sample`` for probes, with group_size, greedy, first_sample and stages to choose.
      grade: (rollout, answers, answer_mask) -> rewards [P, G] on the device; None as for ``iterate``.
      sequence_kl: (params, ref_params, prompts, rollout) -> [P, G] log π/π_ref of the completions.
      warm_start, warm_start_step: params -> state, and (state, prompts, answers, answer_mask) -> (state, metrics).
    """

    start: Wrapped
    iterate: Wrapped | None
    sample: Wrapped
    improve: Wrapped
    draw: Wrapped
    grade: Wrapped | None
    sequence_kl: Wrapped
    warm_start: Wrapped
    warm_start_step: Wrapped


def iterations(
    state: TrainState,
    ref_params: Any,
    table: PromptSet,
    index: jax.Array,
    count: jax.Array,
    base_key: jax.Array,
    first: jax.Array,
    beta: jax.Array,
    learning_rate: jax.Array,
    *,
    pieces: Pieces,
    place: Callable[[Any], Any] = lambda rows: rows,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """Up to K whole iterations on the device, one after the other, without the host.

    Args:
      state: see `TrainState`.
      ref_params: parameters of the reference policy; None where the objective has no KL to it.
      table: all prompts of the task, on the device.
      index: [K, P] int32, the rows of ``table`` that each iteration visits.
      count: how many of the K are run, so that a remainder is the same program.
      base_key: of the run.
      first: number of the first iteration, int32.
      beta, learning_rate: traced.
      pieces: see `Pieces`; with a verifier on the device.
      place: spreads the rows of an iteration over the devices.

    Returns:
      (state, metrics [K], skipped [K]): ``skipped`` is `TrainState.skipped` after each iteration; what was not run is 0.
    """
    assert pieces.verify_tokens is not None
    improve = partial(pieces.improve, learning_rate=learning_rate)
    once = partial(iteration, verify_tokens=pieces.verify_tokens, sample=pieces.sample, improve=improve)

    def run(state: TrainState, i: jax.Array) -> tuple[TrainState, tuple[dict[str, jax.Array], jax.Array]]:
        rows = index[i]
        batch = prompt_batch(table, rows), table.answers[rows], table.answer_mask[rows]
        prompts, answers, answer_mask = place(batch)
        state, metrics = once(state, ref_params, prompts, answers, answer_mask, base_key, first + i, beta)
        return state, (metrics, state.skipped)

    def body(i: jax.Array, carry: tuple) -> tuple:
        state, reported = carry
        state, new = run(state, i)
        return state, jax.tree.map(lambda every, x: every.at[i].set(x), reported, new)

    _, shapes = jax.eval_shape(run, state, first)
    empty = jax.tree.map(lambda x: jnp.zeros((index.shape[0], *x.shape), x.dtype), shapes)
    state, (metrics, skipped) = jax.lax.fori_loop(jnp.int32(0), count, body, (state, empty))
    return state, metrics, skipped


def make_pieces(config: Any, objective: Objective, bound: Bound, *, shards: int = 1, in_step: Any = None) -> Pieces:
    """Binds what the config says.

    Args:
      config, objective, bound: of the run.
      shards: equal parts of the prompts that lie on different devices, see `update`.
      in_step: names of the vmapped axes over which loops run in step, see `sample_groups`.
    """

    def improve(
        state: TrainState,
        ref_params: Any,
        prompts: PromptBatch,
        rollout: Rollout,
        rewards: jax.Array,
        key: jax.Array,
        beta: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return update(
            *(state, ref_params, prompts, rollout, rewards, key, beta),
            policy=bound.policy,
            optimizer=make_optimizer(config, learning_rate),
            objective=objective,
            beta_mirror=config.objective.beta_mirror,
            entropy_bonus=config.objective.entropy_bonus,
            temperature=config.rollout.temperature,
            shards=shards,
            in_step=in_step,
            inner_epochs=config.train.inner_epochs,
            minibatches=config.train.minibatches,
            **_packing(config),
        )

    ends: dict[str, Any] = {"stop_ids": bound.stop_ids, "pad_id": bound.pad_id, "stop_table": bound.stop_table}
    sample = partial(sample_groups, bound.policy, **ends, in_step=in_step, **config.rollout)
    return Pieces(sample, improve, bound.verify_tokens)


def make_functions(config: Any, objective: Objective, bound: Bound, shapes: Any, mesh: Mesh) -> Functions:
    """Jits the pieces of a run for parameters of the given shapes."""
    policy, verify_tokens = bound.policy, bound.verify_tokens
    rows, whole, shards = row_sharding(mesh), replicated(mesh), row_shards(mesh)
    optimizer = make_optimizer(config, config.optimizer.learning_rate)
    warm_optimizer = optax.adamw(config.warm_start.learning_rate, weight_decay=0.0)

    def starting(optimizer: optax.GradientTransformation, *, keeps: bool) -> tuple[Wrapped, Any]:
        """params -> the state before the first step, and the state's shardings."""

        def start(params: Any) -> TrainState:
            # A copy, where the parameters are kept while the donated state changes.
            return init_state(jax.tree.map(jnp.copy, params), optimizer)

        shardings = parameter_shardings(jax.eval_shape(start, shapes), mesh)
        return jax.jit(start, out_shardings=shardings, donate_argnums=() if keeps else 0), shardings

    start, state_shardings = starting(optimizer, keeps=objective.holds_to_reference)
    warm_start, warm_shardings = starting(warm_optimizer, keeps=False)
    pieces = make_pieces(config, objective, bound, shards=shards)
    sample = _spread(pieces.sample, mesh, shapes, config.model.dtype)
    iterate = grade = None
    if verify_tokens is not None:
        grade = jax.jit(lambda r, answers, mask: verify_tokens(r.completions, r.mask, answers, mask))
        place = partial(jax.lax.with_sharding_constraint, shardings=rows)
        iterate = jax.jit(
            partial(iterations, pieces=pieces._replace(sample=sample), place=place),
            donate_argnums=0,
            out_shardings=(state_shardings, whole, whole),
        )

    @jax.jit
    def sequence_kl(params: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout) -> jax.Array:
        layout = _packing(config) | {"shards": row_shards(mesh, rollout.mask.shape[0])}
        score = partial(score_packed, policy, temperature=config.rollout.temperature, **layout)
        logps, ref_logps = (
            score(params=p, prompts=prompts, completions=rollout.completions, mask=rollout.mask)
            for p in (params, ref_params)
        )
        return (logps - ref_logps).sum(-1)

    def demonstration_terms(params: Any, batch: tuple) -> LossTerms:
        prompts, answers, mask = batch
        logps, _ = score_groups(
            policy, params, prompts, answers[:, None], mask[:, None], chunk_size=config.train.chunk_size
        )
        return LossTerms(-jnp.where(mask, logps, 0.0).sum(), mask.sum().astype(jnp.float32), {})

    @partial(jax.jit, donate_argnums=0, out_shardings=(warm_shardings, whole))
    def warm_start_step(
        state: TrainState, prompts: PromptBatch, answers: jax.Array, mask: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return gradient_step(state, (prompts, answers, mask), demonstration_terms, optimizer=warm_optimizer)

    return Functions(
        start=start,
        iterate=iterate,
        sample=jax.jit(sample, static_argnames="stages", out_shardings=_of_rollout(rows, whole)),
        improve=jax.jit(pieces.improve, donate_argnums=0, out_shardings=(state_shardings, whole)),
        draw=jax.jit(sample, static_argnames=("group_size", "greedy", "stages")),
        grade=grade,
        sequence_kl=sequence_kl,
        warm_start=warm_start,
        warm_start_step=warm_start_step,
    )


def make_optimizer(config: Any, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """AdamW on a schedule that peaks at ``learning_rate``, after clipping by the global norm."""
    c = config.optimizer
    updates = config.train.iterations * config.train.inner_epochs * config.train.minibatches
    decay = max(updates - c.warmup_updates, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }[c.schedule]()
    warmup = optax.linear_schedule(0.0, learning_rate, c.warmup_updates)
    schedule = optax.join_schedules([warmup, after], [c.warmup_updates]) if c.warmup_updates else after
    return optax.chain(
        optax.clip_by_global_norm(c.max_grad_norm),
        optax.adamw(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay),
    )


def _packing(config: Any) -> dict[str, Any]:
    """How completions are laid out for a score, which changes time and memory and not the result."""
    return {key: config.train[key] for key in ("microbatch_tokens", "row_length", "chunk_size")}


def _spread(sample: Callable[..., Rollout], mesh: Mesh, shapes: Any, dtype: str) -> Callable[..., Rollout]:
    """``sample`` with the prompts' rows spread over data and fsdp, where they divide.

    Every device decodes its own rows, and stops when they have ended; only a tensor axis is left to XLA. What fsdp spreads is
    gathered once, before the first token, in the type that the matrix products cast it to anyway.
    """

    def cast(leaf: jax.Array, shape: Any) -> jax.Array:
        return leaf.astype(dtype) if "fsdp" in shape.sharding.spec else leaf

    def spread(params: Any, prompts: PromptBatch, key: jax.Array, first_sample: Any = 0, **options: Any) -> Rollout:
        if row_shards(mesh, prompts.tokens.shape[0]) == 1:
            return sample(params, prompts, key, first_sample=first_sample, **options)

        def of_device(params: Any, prompts: PromptBatch, key: jax.Array, first_sample: jax.Array) -> Rollout:
            rollout = sample(params, prompts, key, first_sample=first_sample, **options)
            tokens = rollout.mask.sum(dtype=jnp.float32)
            tokens, work = jax.lax.psum((tokens, tokens / rollout.useful), ROWS[0])
            return rollout._replace(useful=tokens / work)

        whole = PartitionSpec()
        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(whole, ROWS, whole, whole),
            out_specs=_of_rollout(ROWS, whole),
            axis_names=set(ROWS[0]),
            check_vma=False,
        )(jax.tree.map(cast, params, shapes), prompts, key, jnp.asarray(first_sample, jnp.int32))

    return spread


def _of_rollout(rows: Any, whole: Any) -> Any:
    """Where the arrays of a rollout live: by rows, but for the one number."""
    return Rollout(*(whole if field == "useful" else rows for field in Rollout._fields))

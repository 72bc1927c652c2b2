"""From a checked config to the functions of a run: model, prompts, optimizer, and the jitted pieces, placed on the mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax.data import CharTokenizer, HFTokenizer, PromptSet, Tokenizer, encode_prompts, prompt_batch
from grpo_jax.models import DecoderConfig, init_params, load_pretrained, make_policy, read_config
from grpo_jax.objective import LossTerms, Objective
from grpo_jax.rollout import Policy, PromptBatch, Rollout, sample_groups, score_groups
from grpo_jax.tasks import Task
from grpo_jax.train.iteration import iteration, role_key, update
from grpo_jax.train.sharding import make_mesh, parameter_shardings, replicated, row_sharding
from grpo_jax.train.step import TrainState, gradient_step, init_state


class Program(NamedTuple):
    """A run's functions and its fixed data.

    Attributes:
      task, objective, tokenizer, prompts, mesh: what the config names.
      params: the initial parameters, random or pretrained, on the mesh.
      num_params: their number.
      start: params -> `TrainState` of the GRPO optimizer.
      iterate: one whole iteration on the device, (state, ref_params, prompts, answers, answer_mask, base_key, number, beta) ->
        (state, metrics); None where the task verifies on the host only.
      sample, improve: its two halves, (params, prompts, key) -> rollout, and
        (state, ref_params, prompts, rollout, rewards, key, beta) -> (state, metrics).
      draw: ``sample`` for probes, with group_size, greedy and first_sample to choose.
      grade: (rollout, answers, answer_mask) -> rewards on the device; None as for ``iterate``.
      sequence_kl: (params, ref_params, prompts, rollout) -> [P, G] log π/π_ref of the completions.
      warm_start, warm_start_step: params -> state, and (state, prompts, answers, answer_mask) -> (state, metrics).
    """

    task: Task
    objective: Objective
    tokenizer: Tokenizer
    prompts: PromptSet
    mesh: Mesh
    params: Any
    num_params: int
    start: Callable[[Any], TrainState]
    iterate: Callable[..., tuple[TrainState, dict[str, jax.Array]]] | None
    sample: Callable[..., Rollout]
    improve: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    draw: Callable[..., Rollout]
    grade: Callable[..., jax.Array] | None
    sequence_kl: Callable[..., jax.Array]
    warm_start: Callable[[Any], TrainState]
    warm_start_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_program(config: Any, task: Task, objective: Objective) -> Program:
    """Builds the program of a validated config.

    Raises:
      ValueError: a model folder that is refused, or prompts that do not fit the tokenizer or the model.
    """
    mesh = make_mesh(**config.mesh)
    policy, params, tokenizer, decoder = _model(config, task)
    stop_ids = _stop_ids(config, tokenizer)
    limits = {"max_prompt": config.data.max_prompt, "max_completion": config.rollout.max_completion}
    prompts = encode_prompts(task, tokenizer, stop_id=stop_ids[0], **limits)
    total = prompts.tokens.shape[1] + config.rollout.max_completion
    used = max(*stop_ids, tokenizer.pad_id, int(prompts.tokens.max()), int(prompts.answers.max()))
    if used >= decoder.vocab_size:
        raise ValueError(
            f"the tokenizer uses token id {used}, but the model's vocabulary has {decoder.vocab_size}: not a pair"
        )
    if total > decoder.max_length:
        raise ValueError(
            f"prompts of {prompts.tokens.shape[1]} and completions of rollout.max_completion={config.rollout.max_completion} "
            f"tokens make {total}, more than the model's {decoder.max_length}"
        )

    rows, whole = row_sharding(mesh), replicated(mesh)
    params = jax.device_put(params, parameter_shardings(params, mesh))
    optimizer = _optimizer(config)
    warm_optimizer = optax.adamw(config.warm_start.learning_rate, weight_decay=0.0)

    def start(make: optax.GradientTransformation, params: Any) -> TrainState:
        state = init_state(params, make)
        # A copy: the reference keeps the parameters that the donated state starts from.
        return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s), state, parameter_shardings(state, mesh))

    state_shardings = parameter_shardings(jax.eval_shape(partial(init_state, optimizer=optimizer), params), mesh)
    warm_shardings = parameter_shardings(jax.eval_shape(partial(init_state, optimizer=warm_optimizer), params), mesh)
    temperature = config.rollout.temperature
    sample = partial(sample_groups, policy, stop_ids=stop_ids, pad_id=tokenizer.pad_id, **config.rollout)
    improve = partial(
        update,
        policy=policy,
        optimizer=optimizer,
        objective=objective,
        beta_mirror=config.objective.beta_mirror,
        entropy_bonus=config.objective.entropy_bonus,
        temperature=temperature,
        **{k: config.train[k] for k in ("inner_epochs", "minibatches", "microbatches", "chunk_size")},
    )
    # One answer has one spelling in characters, and may have several in sub-words: those are judged as text, on the host.
    verify_tokens = task.verify_tokens if config.model.path is None and len(stop_ids) == 1 else None
    iterate = None
    if verify_tokens is not None:
        iterate = jax.jit(
            partial(iteration, verify_tokens=verify_tokens, sample=sample, improve=improve),
            donate_argnums=0,
            out_shardings=(state_shardings, whole),
        )

    @jax.jit
    def sequence_kl(params: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout) -> jax.Array:
        logps, ref_logps = (
            score_groups(
                policy,
                p,
                prompts,
                rollout.completions,
                rollout.mask,
                temperature=temperature,
                chunk_size=config.train.chunk_size,
            )[0]
            for p in (params, ref_params)
        )
        ratio = (logps - ref_logps).reshape(rollout.mask.shape)
        return jnp.where(rollout.mask, ratio, 0.0).sum(-1)

    def demonstration_terms(params: Any, part: tuple) -> tuple[LossTerms, dict[str, jax.Array]]:
        prompts, answers, mask = part
        logps, _ = score_groups(
            policy, params, prompts, answers[:, None], mask[:, None], chunk_size=config.train.chunk_size
        )
        return LossTerms(-jnp.where(mask, logps, 0.0).sum(), mask.sum().astype(jnp.float32), {}), {}

    @partial(jax.jit, donate_argnums=0, out_shardings=(warm_shardings, whole))
    def warm_start_step(
        state: TrainState, prompts: PromptBatch, answers: jax.Array, mask: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return gradient_step(state, (prompts, answers, mask), demonstration_terms, optimizer=warm_optimizer)

    return Program(
        task=task,
        objective=objective,
        tokenizer=tokenizer,
        prompts=prompts,
        mesh=mesh,
        params=params,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        start=partial(start, optimizer),
        iterate=iterate,
        sample=jax.jit(sample, out_shardings=rows),
        improve=jax.jit(improve, donate_argnums=0, out_shardings=(state_shardings, whole)),
        draw=jax.jit(sample, static_argnames=("group_size", "greedy")),
        grade=None if verify_tokens is None else jax.jit(lambda r, a, m: verify_tokens(r.completions, r.mask, a, m)),
        sequence_kl=sequence_kl,
        warm_start=partial(start, warm_optimizer),
        warm_start_step=warm_start_step,
    )


def put_prompts(program: Program, index: np.ndarray) -> tuple[PromptBatch, jax.Array, jax.Array]:
    """(prompts, answers, answer_mask) of the given rows of the dataset, spread over the mesh where it divides them."""
    batch = (prompt_batch(program.prompts, index), program.prompts.answers[index], program.prompts.answer_mask[index])
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    return jax.device_put(batch, row_sharding(program.mesh) if len(index) % shards == 0 else replicated(program.mesh))


def _model(config: Any, task: Task) -> tuple[Policy, Any, Tokenizer, DecoderConfig]:
    if config.model.path is not None:
        policy, params = load_pretrained(config.model.path, dtype=config.model.dtype)
        return policy, params, HFTokenizer(config.model.path), read_config(config.model.path)
    demonstrations = [task.demonstrations(example) for example in task.examples] if task.demonstrations else []
    tokenizer = CharTokenizer(
        "".join(sorted({c for text in [*demonstrations, *(e.prompt for e in task.examples)] for c in text}))
    )
    sizes = {key: value for key, value in config.model.items() if key not in ("path", "stop_ids")}
    max_length = config.data.max_prompt + config.rollout.max_completion
    decoder = DecoderConfig(vocab_size=tokenizer.vocab_size, max_length=max_length, **sizes)
    params = init_params(decoder, role_key(jax.random.key(config.seed), "initialisation", 0))
    return make_policy(decoder), params, tokenizer, decoder


def _stop_ids(config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    stop_ids = tuple(config.model.stop_ids) or ((tokenizer.eos_id,) if tokenizer.eos_id is not None else ())
    if not stop_ids:
        raise ValueError("the tokenizer names no EOS: set model.stop_ids to the token ids that end a completion")
    if not all(0 <= i < tokenizer.vocab_size for i in stop_ids):
        raise ValueError(f"model.stop_ids={stop_ids} must be token ids from 0 to {tokenizer.vocab_size - 1}")
    return stop_ids


def _optimizer(config: Any) -> optax.GradientTransformation:
    c = config.optimizer
    updates = config.train.iterations * config.train.inner_epochs * config.train.minibatches
    decay = max(updates - c.warmup_updates, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, decay),
        "linear": lambda: optax.linear_schedule(c.learning_rate, 0.0, decay),
        "constant": lambda: optax.constant_schedule(c.learning_rate),
    }[c.schedule]()
    warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_updates)
    schedule = optax.join_schedules([warmup, after], [c.warmup_updates]) if c.warmup_updates else after
    return optax.chain(
        optax.clip_by_global_norm(c.max_grad_norm),
        optax.adamw(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay),
    )

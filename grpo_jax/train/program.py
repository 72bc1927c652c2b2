"""From a checked config to the functions of a run: model, prompts, optimizer, and the jitted pieces, placed on the mesh."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from grpo_jax.config import decoder_options
from grpo_jax.data import (
    ByteTokenizer,
    CharTokenizer,
    ChatFormat,
    HFTokenizer,
    PromptSet,
    Tokenizer,
    encode_prompts,
    prompt_batch,
    read_chat,
)
from grpo_jax.models import (
    DecoderConfig,
    check_pretrained,
    init_params,
    load_pretrained,
    make_policy,
    param_shapes,
    read_config,
)
from grpo_jax.objective import LossTerms, Objective
from grpo_jax.rollout import Policy, PromptBatch, Rollout, sample_groups, score_groups
from grpo_jax.tasks import Task
from grpo_jax.train.iteration import iteration, role_key, update
from grpo_jax.train.sharding import make_mesh, parameter_shardings, replicated, row_sharding, sharded_shapes
from grpo_jax.train.step import TrainState, gradient_step, init_state


class Functions(NamedTuple):
    """The jitted pieces of a run; they know shapes and sharding, not what the parameters are.

    Attributes:
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

    start: Wrapped
    iterate: Wrapped | None
    sample: Wrapped
    improve: Wrapped
    draw: Wrapped
    grade: Wrapped | None
    sequence_kl: Wrapped
    warm_start: Wrapped
    warm_start_step: Wrapped


class Program(NamedTuple):
    """A run's functions and its fixed data.

    Attributes:
      task, objective, tokenizer, chat, prompts, mesh: what the config names; chat is None for prompts as they are.
      probed: rows of the prompts that probes measure.
      shapes: of the parameters (``jax.ShapeDtypeStruct`` with shardings).
      initial_params: () -> the initial parameters, random or pretrained, on the mesh.
      functions: see `Functions`.
    """

    task: Task
    objective: Objective
    tokenizer: Tokenizer
    chat: ChatFormat | None
    prompts: PromptSet
    mesh: Mesh
    probed: np.ndarray
    shapes: Any
    initial_params: Callable[[], Any]
    functions: Functions


def make_program(config: Any, task: Task, objective: Objective, *, training: bool = True) -> Program:
    """Builds the program of a validated config; parameters are neither drawn nor read yet.

    ``training`` says whether iterations follow, which need enough prompts for one.

    Raises:
      ValueError: a model folder that is refused, or prompts that do not fit the tokenizer or the model.
    """
    mesh, c = make_mesh(**config.mesh), config.data
    if config.model.path is not None:
        check_pretrained(config.model.path)
    tokenizer, decoder = make_tokenizer(config, task), make_decoder(config, task)
    stop_ids = _stop_ids(config, tokenizer)
    # One answer has one spelling in characters, and may have several in sub-words: those are judged as text, on the host.
    verify_tokens = task.verify_tokens if config.model.path is None and len(stop_ids) == 1 else None
    if config.warm_start.max_steps == 0 and verify_tokens is None:
        task = task._replace(demonstrations=None)  # nothing reads them, so their length is no matter
    chat = _chat(config, tokenizer)
    task, prompts = encode_prompts(
        task,
        tokenizer,
        stop_id=stop_ids[0],
        max_prompt=c.max_prompt,
        max_completion=config.rollout.max_completion,
        too_long=c.too_long,
        chat=chat,
    )
    if training and c.prompts_per_iteration > len(task.examples):
        raise ValueError(
            f"data.prompts_per_iteration={c.prompts_per_iteration} exceeds the {len(task.examples)} prompts that "
            f"data.max_prompt={c.max_prompt} leaves"
        )
    _check_fit(config, tokenizer, decoder, prompts, stop_ids)
    shapes = sharded_shapes(param_shapes(decoder), mesh)

    def initial_params() -> Any:
        if config.model.path is not None:
            return load_pretrained(config.model.path, shardings=partial(parameter_shardings, mesh=mesh))[1]
        params = init_params(decoder, role_key(jax.random.key(config.seed), "initialisation", 0))
        return jax.device_put(params, parameter_shardings(params, mesh))

    return Program(
        task=task,
        objective=objective,
        tokenizer=tokenizer,
        chat=chat,
        prompts=prompts,
        mesh=mesh,
        probed=_probed(config, len(task.examples)),
        shapes=shapes,
        initial_params=initial_params,
        functions=make_functions(
            config,
            objective,
            make_policy(decoder),
            shapes,
            mesh,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_id,
            verify_tokens=verify_tokens,
        ),
    )


def make_functions(
    config: Any,
    objective: Objective,
    policy: Policy,
    shapes: Any,
    mesh: Mesh,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    verify_tokens: Callable[..., jax.Array] | None,
) -> Functions:
    """Jits the pieces of a run for parameters of the given shapes."""
    rows, whole = row_sharding(mesh), replicated(mesh)
    optimizer = make_optimizer(config)
    warm_optimizer = optax.adamw(config.warm_start.learning_rate, weight_decay=0.0)

    def starting(optimizer: optax.GradientTransformation) -> tuple[Wrapped, Any]:
        """params -> the state before the first step, and the state's shardings."""

        def start(params: Any) -> TrainState:
            # A copy: the reference keeps the parameters that the donated state starts from.
            return init_state(jax.tree.map(jnp.copy, params), optimizer)

        shardings = parameter_shardings(jax.eval_shape(start, shapes), mesh)
        return jax.jit(start, out_shardings=shardings), shardings

    start, state_shardings = starting(optimizer)
    warm_start, warm_shardings = starting(warm_optimizer)
    temperature, chunk_size = config.rollout.temperature, config.train.chunk_size
    sample = partial(sample_groups, policy, stop_ids=stop_ids, pad_id=pad_id, **config.rollout)
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
    iterate = None
    if verify_tokens is not None:
        iterate = jax.jit(
            partial(iteration, verify_tokens=verify_tokens, sample=sample, improve=improve),
            donate_argnums=0,
            out_shardings=(state_shardings, whole),
        )

    @jax.jit
    def sequence_kl(params: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout) -> jax.Array:
        score = partial(score_groups, policy, temperature=temperature, chunk_size=chunk_size)
        logps, ref_logps = (score(p, prompts, rollout.completions, rollout.mask)[0] for p in (params, ref_params))
        ratio = (logps - ref_logps).reshape(rollout.mask.shape)
        return jnp.where(rollout.mask, ratio, 0.0).sum(-1)

    def demonstration_terms(params: Any, part: tuple) -> tuple[LossTerms, dict[str, jax.Array]]:
        prompts, answers, mask = part
        logps, _ = score_groups(policy, params, prompts, answers[:, None], mask[:, None], chunk_size=chunk_size)
        return LossTerms(-jnp.where(mask, logps, 0.0).sum(), mask.sum().astype(jnp.float32), {}), {}

    @partial(jax.jit, donate_argnums=0, out_shardings=(warm_shardings, whole))
    def warm_start_step(
        state: TrainState, prompts: PromptBatch, answers: jax.Array, mask: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return gradient_step(state, (prompts, answers, mask), demonstration_terms, optimizer=warm_optimizer)

    return Functions(
        start=start,
        iterate=iterate,
        sample=jax.jit(sample, out_shardings=rows),
        improve=jax.jit(improve, donate_argnums=0, out_shardings=(state_shardings, whole)),
        draw=jax.jit(sample, static_argnames=("group_size", "greedy")),
        grade=None if verify_tokens is None else jax.jit(lambda r, a, m: verify_tokens(r.completions, r.mask, a, m)),
        sequence_kl=sequence_kl,
        warm_start=warm_start,
        warm_start_step=warm_start_step,
    )


def put_prompts(program: Program, index: np.ndarray) -> tuple[PromptBatch, jax.Array, jax.Array]:
    """(prompts, answers, answer_mask) of the given rows of the dataset, spread over the mesh where it divides them."""
    batch = (prompt_batch(program.prompts, index), program.prompts.answers[index], program.prompts.answer_mask[index])
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    return jax.device_put(batch, row_sharding(program.mesh) if len(index) % shards == 0 else replicated(program.mesh))


def prompt_text(program: Program, row: int) -> str:
    """The prompt of a row as the model is given it, with its chat template; without the BOS that a tokenizer adds."""
    text = program.task.examples[row].prompt
    return text if program.chat is None else program.chat.frame.before + text + program.chat.frame.after


def make_decoder(config: Any, task: Task) -> DecoderConfig:
    """The decoder of a config: that of its folder, or one of its sizes with the vocabulary of the task."""
    if config.model.path is not None:
        return replace(read_config(config.model.path), dtype=config.model.dtype, remat=config.model.remat)
    max_length = config.data.max_prompt + config.rollout.max_completion
    return DecoderConfig(
        vocab_size=make_tokenizer(config, task).vocab_size, max_length=max_length, **decoder_options(config)
    )


def make_tokenizer(config: Any, task: Task) -> Tokenizer:
    """The tokenizer of the model's folder, or bytes, or the characters of the task's texts."""
    if config.model.path is not None:
        return HFTokenizer(config.model.path)
    if config.model.tokenizer == "bytes":
        return ByteTokenizer()
    demonstrations = [task.demonstrations(example) for example in task.examples] if task.demonstrations else []
    return CharTokenizer(
        "".join(sorted({c for text in [*demonstrations, *(e.prompt for e in task.examples)] for c in text}))
    )


def _probed(config: Any, rows: int) -> np.ndarray:
    """All rows, or evaluate.prompts of them, chosen by the seed."""
    few = config.evaluate.prompts
    if few is None or few >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng((config.seed, rows)).choice(rows, few, replace=False))


def _chat(config: Any, tokenizer: Tokenizer) -> ChatFormat | None:
    c = config.data
    if not c.chat:
        return None
    assert isinstance(tokenizer, HFTokenizer)  # validate: chat needs a model folder
    thinking = {} if c.enable_thinking is None else {"enable_thinking": c.enable_thinking}
    return read_chat(tokenizer, system=c.system, arguments=thinking)


def _check_fit(
    config: Any,
    tokenizer: Tokenizer,
    decoder: DecoderConfig,
    prompts: PromptSet,
    stop_ids: tuple[int, ...],
) -> None:
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


def _stop_ids(config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    stop_ids = tuple(config.model.stop_ids) or tokenizer.stop_ids
    if not stop_ids:
        raise ValueError("the tokenizer names no EOS: set model.stop_ids to the token ids that end a completion")
    if not all(0 <= i < tokenizer.vocab_size for i in stop_ids):
        raise ValueError(f"model.stop_ids={stop_ids} must be token ids from 0 to {tokenizer.vocab_size - 1}")
    return stop_ids


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW on a schedule, after clipping by the global norm."""
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

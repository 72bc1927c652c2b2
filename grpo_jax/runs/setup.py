"""From a checked config to what runs: task, tokenizer, prompts, model and mesh, the recipe, and its compiled functions."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import ConfigError, averaged_iterations, decoder_options
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
    stop_table,
)
from grpo_jax.models import (
    DecoderConfig,
    check_pretrained,
    choose_query_block,
    init_params,
    load_pretrained,
    make_policy,
    param_shapes,
    read_config,
)
from grpo_jax.models.lora import Lora
from grpo_jax.objective import Objective
from grpo_jax.processes import put
from grpo_jax.rollout import Layout, Policy, PromptBatch, sample_groups
from grpo_jax.storage import fetched
from grpo_jax.tasks import Task
from grpo_jax.train.compiled import Compiled, compile_recipe
from grpo_jax.train.iteration import Recipe, role_key
from grpo_jax.train.optimizer import make_optimizer, make_warm_start_optimizer
from grpo_jax.train.sharding import (
    gather_layer,
    make_mesh,
    parameter_shardings,
    replicated,
    row_sharding,
    sharded_shapes,
)


class Setup(NamedTuple):
    """What a config names, built.

    Attributes:
      task, tokenizer, chat, prompts, mesh: of the config; chat is None for prompts as they are.
      stop_ids: the tokens that end a completion.
      visited: rows of the prompts that are trained on.
      held_out: rows of those that are never.
      probed: [Q] rows of the prompts that are measured, of those that are trained on.
      shapes: of the parameters (``jax.ShapeDtypeStruct`` with shardings).
      trained: the same of what is trained: the parameters, or their adapters.
      initial_params: seed -> the initial parameters, random or pretrained, on the mesh.
      begin: (ref_params, seed) -> what is trained as it is at the start, on the mesh, where the policy is the reference.
      recipe: how the policy learns.
      compiled: the recipe's functions as programs.
    """

    task: Task
    tokenizer: Tokenizer
    chat: ChatFormat | None
    prompts: PromptSet
    mesh: Mesh
    stop_ids: tuple[int, ...]
    visited: np.ndarray
    held_out: np.ndarray
    probed: np.ndarray
    shapes: Any
    trained: Any
    initial_params: Callable[[int], Any]
    begin: Callable[[Any, int], Any]
    recipe: Recipe
    compiled: Compiled


def make_setup(
    config: Any, task: Task, objective: Objective, *, training: bool = True, devices: list[Any] | None = None
) -> Setup:
    """Builds what a validated config names; parameters are neither made nor read yet.

    Args:
      config, task, objective: as `validate` takes and returns them.
      training: whether iterations follow, which need enough prompts for one.
      devices: of the mesh; all by default.

    Raises:
      ConfigError: a model folder that is refused, or prompts that do not fit the tokenizer or the model.
    """
    try:
        return _build(config, task, objective, training, devices)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _build(config: Any, task: Task, objective: Objective, training: bool, devices: list[Any] | None) -> Setup:
    mesh, c = make_mesh(**config.mesh, devices=devices), config.data
    # The model and its tokenizer, from a folder or from the sizes in the config.
    if config.model.path is not None:
        check_pretrained(fetched(config.model.path))
    tokenizer = make_tokenizer(config, task)
    decoder = make_decoder(config, task, mesh, tokenizer)
    stop_ids = _stop_ids(config, tokenizer)
    # A verifier of tokens is used only where every answer has a single spelling in tokens: characters or bytes, and one way to
    # end. Elsewhere the text is judged, on the host.
    unique_spelling = config.model.path is None and len(stop_ids) == 1 and not config.model.stop_strings
    verify_tokens = task.verify_tokens if unique_spelling else None
    # The prompts as arrays. Demonstrations that nothing reads are left out, so that their length does not matter.
    if config.warm_start.max_steps == 0 and verify_tokens is None:
        task = task._replace(demonstrations=None)
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
    visited, held_out = split_rows(len(task.examples), config.evaluate.held_out if training else 0, seed=config.seed)
    if training and c.prompts_per_iteration > len(visited):
        raise ValueError(
            f"data.prompts_per_iteration={c.prompts_per_iteration} exceeds the {len(visited)} prompts that "
            f"data.max_prompt={c.max_prompt} leaves"
        )
    _check_fit(config, tokenizer, decoder, prompts, stop_ids)

    def initial_params(seed: int) -> Any:
        if config.model.path is not None:
            return load_pretrained(fetched(config.model.path), shardings=partial(parameter_shardings, mesh=mesh))[1]
        params = init_params(decoder, role_key(jax.random.key(seed), "initialisation", 0))
        return jax.device_put(params, parameter_shardings(params, mesh))

    def begin(ref_params: Any, seed: int) -> Any:
        if lora is None:
            return ref_params
        adapters = lora.init(shapes, role_key(jax.random.key(seed), "adapters", 0))
        return put(adapters, replicated(mesh))

    # The recipe, and its programs.
    lora = make_lora(config)
    shapes = sharded_shapes(param_shapes(decoder), mesh)
    trained = trained_shapes(config, shapes, mesh)
    table = stop_table(tokenizer, config.model.stop_strings, vocab_size=decoder.vocab_size)
    recipe = make_recipe(
        config,
        objective,
        decoder,
        shapes,
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_id,
        stop_table=None if table is None else jnp.asarray(table),
        verify_tokens=verify_tokens,
    )
    return Setup(
        task=task,
        tokenizer=tokenizer,
        chat=chat,
        prompts=prompts,
        mesh=mesh,
        stop_ids=stop_ids,
        visited=visited,
        held_out=held_out,
        probed=probed_rows(config, visited),
        shapes=shapes,
        trained=trained,
        initial_params=initial_params,
        begin=begin,
        recipe=recipe,
        compiled=make_compiled(
            config, recipe, shapes, mesh, trained=trained, precise=make_policy(replace(decoder, dtype="float32"))
        ),
    )


def make_lora(config: Any) -> Lora | None:
    """The adapters of a config; None where all parameters are trained."""
    c = config.lora
    return Lora(c.rank, 2.0 * c.rank if c.alpha is None else c.alpha, tuple(c.targets)) if c.rank else None


def trained_shapes(config: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shapes and shardings of what is trained, from those of the parameters."""
    lora = make_lora(config)
    if lora is None:
        return shapes
    return sharded_shapes(jax.eval_shape(partial(lora.init, shapes), jax.random.key(0)), mesh)


def make_recipe(
    config: Any,
    objective: Objective,
    decoder: DecoderConfig,
    shapes: Any,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    stop_table: jax.Array | None = None,
    verify_tokens: Callable[..., jax.Array] | None = None,
) -> Recipe:
    """The recipe of a validated config, for one device; arguments as of `Recipe` and `sample_groups`.

    ``shapes`` are those of the parameters, with shardings.
    """
    policy, lora = make_policy(decoder), make_lora(config)
    by_layer = config.model.gather == "layer" and config.mesh.fsdp > 1
    sampler = make_policy(decoder, gather=gather_layer(shapes)) if by_layer else policy
    c = config.train
    optimizer = {key: value for key, value in config.optimizer.items() if key != "learning_rate"}
    updates = c.inner_epochs * c.minibatches  # of an iteration
    return Recipe(
        policy=policy,
        objective=objective,
        sample=partial(
            sample_groups, sampler, stop_ids=stop_ids, pad_id=pad_id, stop_table=stop_table, **config.rollout
        ),
        optimizer=make_optimizer(
            updates=c.iterations * updates, averaged_updates=averaged_iterations(config) * updates, **optimizer
        ),
        layout=Layout(c.microbatch_tokens, c.row_length, chunk_size=c.chunk_size),
        temperature=config.rollout.temperature,
        beta_mirror=config.objective.beta_mirror,
        entropy_bonus=config.objective.entropy_bonus,
        inner_epochs=c.inner_epochs,
        minibatches=c.minibatches,
        verify_tokens=verify_tokens,
        join=None if lora is None else lora.join,
    )


def make_compiled(
    config: Any, recipe: Recipe, shapes: Any, mesh: Mesh, *, trained: Any, precise: Policy | None = None
) -> Compiled:
    """`compile_recipe` with the dtype and the warm start's optimizer of the config."""
    warm_optimizer = make_warm_start_optimizer(config.warm_start.learning_rate)
    options = {"dtype": config.model.dtype, "gather": config.model.gather, "precise": precise, "trained": trained}
    return compile_recipe(recipe, shapes, mesh, warm_optimizer=warm_optimizer, **options)


def put_prompts(setup: Setup, index: np.ndarray) -> tuple[PromptBatch, jax.Array, jax.Array]:
    """(prompts, answers, answer_mask) of the rows ``index`` of the dataset, spread over the mesh where it divides them."""
    return put(_rows(setup, index), row_sharding(setup.mesh, len(index)))


def put_table(setup: Setup) -> tuple[PromptBatch, jax.Array, jax.Array]:
    """(prompts, answers, answer_mask) of the whole dataset, on every device; see `iterations`."""
    return put(_rows(setup, np.arange(len(setup.task.examples))), replicated(setup.mesh))


def _rows(setup: Setup, index: np.ndarray) -> tuple[PromptBatch, np.ndarray, np.ndarray]:
    return prompt_batch(setup.prompts, index), setup.prompts.answers[index], setup.prompts.answer_mask[index]


def prompt_text(setup: Setup, row: int) -> str:
    """The prompt of a row as the model is given it, with its chat template; without the BOS that a tokenizer adds."""
    text = setup.task.examples[row].prompt
    return text if setup.chat is None else setup.chat.frame.before + text + setup.chat.frame.after


def make_decoder(config: Any, task: Task, mesh: Mesh, tokenizer: Tokenizer | None = None) -> DecoderConfig:
    """The decoder of a config: that of the model folder, or one of the sizes in the config, with the tokenizer's vocabulary."""
    if config.model.path is not None:
        decoder = replace(read_config(fetched(config.model.path)), dtype=config.model.dtype, remat=config.model.remat)
    else:
        decoder = DecoderConfig(
            vocab_size=(tokenizer or make_tokenizer(config, task)).vocab_size,
            max_length=config.data.max_prompt + config.rollout.max_completion,
            **decoder_options(config),
        )
    return for_devices(decoder, mesh, config.train.microbatch_tokens)


def for_devices(decoder: DecoderConfig, mesh: Mesh, tokens: int) -> DecoderConfig:
    """The decoder in the form that suits the devices of a mesh, for calls of so many tokens on each.

    The kernel of decoding is for TPUs, on which heads of keys are not divided.
    """
    platform, parts = mesh.devices.flat[0].platform, mesh.shape["tensor"]
    query_block = choose_query_block(platform, max(1, decoder.num_heads // parts), tokens)
    return replace(
        decoder, query_block=query_block, decode_kernel=platform == "tpu" and decoder.num_kv_heads % parts == 0
    )


def make_tokenizer(config: Any, task: Task) -> Tokenizer:
    """The tokenizer of the model's folder, or bytes, or the characters of the task's texts."""
    if config.model.path is not None:
        return HFTokenizer(fetched(config.model.path))
    if config.model.tokenizer == "bytes":
        return ByteTokenizer()
    demonstrations = [task.demonstrations(example) for example in task.examples] if task.demonstrations else []
    return CharTokenizer(
        "".join(sorted({c for text in [*demonstrations, *(e.prompt for e in task.examples)] for c in text}))
    )


def split_rows(rows: int, few: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are trained on, and ``few`` others that are held out, chosen by the seed; all where there are no more.

    >>> [part.tolist() for part in split_rows(6, 2, seed=0)]
    [[0, 2, 3, 5], [1, 4]]
    """
    held_out = np.sort(np.random.default_rng((seed, rows, few)).choice(rows, min(few, rows), replace=False))
    return np.setdiff1d(np.arange(rows), held_out), held_out


def probed_rows(config: Any, visited: np.ndarray) -> np.ndarray:
    """All rows that are trained on, or evaluate.prompts of them, chosen by the seed."""
    few, rows = config.evaluate.prompts, len(visited)
    if few is None or few >= rows:
        return visited
    return visited[np.sort(np.random.default_rng((config.seed, rows)).choice(rows, few, replace=False))]


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

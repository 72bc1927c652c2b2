"""The programs that an accelerator is measured with, and what they are given: as shapes, to compile, and as arrays, to run.

The models have the shapes of Qwen2.5 and random weights. Completions are of fixed length, or end with every token with
probability 1 / mean: then the first V / mean tokens of the vocabulary end a completion, which for random weights comes to that.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.benchmarks.limits import Work, geometric_lengths
from grpo_jax.models import DecoderConfig, init_params, make_policy, param_shapes
from grpo_jax.objective import DAPO
from grpo_jax.rollout import Layout, PromptBatch, Rollout, sample_groups
from grpo_jax.rollout.packing import pack
from grpo_jax.runs.setup import for_devices
from grpo_jax.train.compiled import compile_recipe
from grpo_jax.train.iteration import Recipe
from grpo_jax.train.sharding import make_mesh, replicated, row_sharding, sharded_shapes
from grpo_jax.train.step import init_state

SIZES = {  # layers, width, heads, key/value heads, head dim, feed-forward width, vocabulary
    "tiny": (2, 64, 4, 2, 16, 128, 512),
    "0.5B": (24, 896, 14, 2, 64, 4864, 151_936),
    "1.5B": (28, 1536, 12, 2, 128, 8960, 151_936),
    "7B": (28, 3584, 28, 4, 128, 18_944, 152_064),
}
WORKS = ("sampling", "update", "iteration")
PAD = 0


class Setting(NamedTuple):
    """What is sampled and learned; letters as in the dimension key of grpo_jax.

    Attributes:
      size: of the model, a key of `SIZES`.
      rows, group: B and G, which divides B.
      prompt, completion: S and T.
      mean: of the lengths of ragged completions, before T cuts them.
      ragged: whether completions end by themselves.
      microbatch: tokens whose activations exist at once in the update.
      chunk: positions of each of its rows whose logits do. Every chunk adds a gradient of the unembedding, so few are better.
    """

    size: str
    rows: int
    group: int = 16
    prompt: int = 256
    completion: int = 1024
    mean: int = 256
    ragged: bool = False
    microbatch: int = 32_768
    chunk: int = 128

    @property
    def work(self) -> Work:
        """Groups with lengths as they are drawn; of sampling, the lengths that come out differ."""
        prompts = self.rows // self.group
        fixed = np.full((prompts, self.group), self.completion)
        drawn = geometric_lengths(prompts, self.group, self.mean, self.completion)
        return Work(drawn if self.ragged else fixed, self.prompt)


def decoder(setting: Setting, mesh: Mesh | None = None) -> DecoderConfig:
    """The model, in the form for these devices: bfloat16 products, layers computed again in the backward pass."""
    layers, width, heads, kv_heads, head_dim, d_ff, vocabulary = SIZES[setting.size]
    config = DecoderConfig(
        vocabulary,
        layers,
        width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        max_length=setting.prompt + setting.completion,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        attention_bias=True,
        dtype="bfloat16",
        remat="full",
        family="qwen2",
        tied=setting.size != "7B",
    )
    return config if mesh is None else for_devices(config, mesh, setting.microbatch)


def build(work: str, setting: Setting, mesh: Mesh | None = None) -> tuple[Any, tuple[Any, ...]]:
    """(jitted function, its arguments as shapes) of one of `WORKS`, as a run has them.

    sampling: (params, prompts, key) -> rollout; update: (state, None, prompts, rollout, rewards, key, beta, learning rate) ->
    (state, metrics); iteration: (state, None, table of prompts and answers, rows, count, key, number, beta, learning rate) ->
    (state, metrics, skipped), with a verifier on the device.

    Args:
      work, setting: what is done.
      mesh: the devices to compile for, which need not be there; None: the first of this process.

    >>> function, shapes = build("sampling", Setting("tiny", 32, prompt=8, completion=4))
    >>> jax.eval_shape(function, *shapes).completions.shape
    (2, 16, 4)
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    config = decoder(setting, mesh)
    policy, params = make_policy(config), sharded_shapes(param_shapes(config), mesh)
    # Where none may end, the token that ends a completion is one that there is not.
    stops = tuple(range(config.vocab_size // setting.mean)) if setting.ragged else (config.vocab_size,)
    options: dict[str, Any] = {
        "group_size": setting.group,
        "max_completion": setting.completion,
        "stop_ids": stops,
        "pad_id": PAD,
    }
    recipe = Recipe(
        policy,
        DAPO,
        sample=partial(sample_groups, policy, **options),
        optimizer=lambda _: _optimizer(),
        layout=Layout(setting.microbatch, chunk_size=setting.chunk),
        verify_tokens=lambda completions, *_: completions.sum(-1) % 2 == 1,  # odd sums are right
    )
    compiled = compile_recipe(recipe, params, mesh, dtype=config.dtype, warm_optimizer=_optimizer())
    programs = {"sampling": compiled.sample, "update": compiled.learn, "iteration": compiled.iterate}

    def placed(x: Any, leads_with_rows: bool) -> Any:
        sharding = row_sharding(mesh, x.shape[0]) if leads_with_rows else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    first, *others = jax.eval_shape(lambda: arrays(work, setting))
    first = params if work == "sampling" else sharded_shapes(first, mesh)
    rows = setting.rows // setting.group
    by_rows = work != "iteration"  # whose table is whole on every device
    return programs[work], (
        first,
        *jax.tree.map(lambda x: placed(x, by_rows and x.ndim > 0 and x.shape[0] == rows), others),
    )


def arrays(work: str, setting: Setting) -> tuple[Any, ...]:
    """The arguments that `build` has given as shapes; random weights, prompts and, for an update, completions."""
    config = decoder(setting)
    params, prompts, key = init_params(config, jax.random.key(0)), _prompts(setting, config), jax.random.key(1)
    if work == "sampling":
        return params, prompts, key
    state = init_state(params, _optimizer())
    zero = jnp.float32(0.0)  # β and rate, which neither DAPO nor _optimizer reads
    if work == "update":
        return state, None, prompts, *_rollout(setting, config), key, zero, zero
    answers = jnp.zeros((len(prompts.index), setting.completion), jnp.int32)
    table = prompts, answers, answers == 0
    return state, None, table, prompts.index[None], jnp.int32(1), key, jnp.int32(0), zero, zero


def blocks(setting: Setting) -> int:
    """Micro-batches of the update."""
    mask = np.arange(setting.completion) < setting.work.lengths[..., None]
    return int(pack(jnp.array(mask), Layout(setting.microbatch)).used)


def _optimizer() -> optax.GradientTransformation:
    """As launch.py's: both moments in float32."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def _prompts(setting: Setting, config: DecoderConfig) -> PromptBatch:
    shape = setting.rows // setting.group, setting.prompt
    tokens = jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size)
    return PromptBatch(tokens, jnp.ones(shape, bool), jnp.arange(shape[0], dtype=jnp.int32))


def _rollout(setting: Setting, config: DecoderConfig) -> tuple[Rollout, jax.Array]:
    """Completions of random tokens and the lengths of ``setting.work``, and their rewards."""
    lengths = jnp.array(setting.work.lengths, jnp.int32)
    mask = jnp.arange(setting.completion, dtype=jnp.int32)[None, None] < lengths[..., None]
    tokens = jax.random.randint(jax.random.key(3), mask.shape, 0, config.vocab_size)
    logps = jnp.where(mask, -jnp.log(jnp.float32(config.vocab_size)), 0.0)
    rewards = jax.random.bernoulli(jax.random.key(4), shape=lengths.shape).astype(jnp.float32)
    fields = {"completions": jnp.where(mask, tokens, PAD), "mask": mask, "logps": logps}
    fields |= {"truncated": lengths == setting.completion, "useful": jnp.float32(1.0)}
    return Rollout(**{name: fields[name] for name in Rollout._fields}), rewards

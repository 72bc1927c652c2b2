"""The functions of a run as programs: jit, donated memory, shardings. The mathematics is in iteration.py."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from grpo_jax.rollout import Policy, PromptBatch, Rollout
from grpo_jax.train import scores
from grpo_jax.train.iteration import Recipe, iterations, learn, log_ratios
from grpo_jax.train.sharding import (
    parameter_shardings,
    replicated,
    rollout_shardings,
    row_sharding,
    row_shards,
    spread_sampling,
)
from grpo_jax.train.step import TrainState, gradient_step, init_state
from grpo_jax.train.supervised import demonstration_terms

# By platform, of programs that decode. A TPU's compiler would bring whole caches to the chip, and back, to use a part of them.
DECODING_OPTIONS = {"tpu": {"xla_tpu_msa_inefficient_use_to_copy_ratio": "1.0"}}


class ScorePrograms(NamedTuple):
    """The functions of `grpo_jax.train.scores`, of which the network's R² is made; see there.

    Attributes:
      pull_back: (trained, ref_params, prompts, rollout, weights) -> Sᵀ weights, like ``trained``.
      along: (trained, ref_params, direction, step, prompts, rollout) -> [P, G].
      moments, whitening, whiten: as there.
      add: (x, scale, y) -> x + scale·y, of trees like what is trained; x is donated.
    """

    pull_back: Wrapped
    along: Wrapped
    moments: Wrapped
    whitening: Wrapped
    whiten: Wrapped
    add: Wrapped


class Compiled(NamedTuple):
    """The jitted functions of a run; they depend on the shapes and shardings of the parameters, not on their values.

    What is trained are the parameters of the policy, or a part of them, see `Recipe.join`.

    Attributes:
      start: trained -> `TrainState` of copies of it; where no reference is kept, it is donated.
      iterate: `iterations` of the recipe; None where the host verifies.
      sample: (params, prompts, key, stages=None) -> rollout.
      learn: `learn` of the recipe.
      sample_probe: ``sample`` for measurements: any number of prompts, and group_size, greedy and first_sample of the call.
      verify: (rollout, answers, answer_mask) -> bool [P, G] on the device; None where the host verifies.
      log_ratios: (params, ref_params, prompts, rollout) -> log π/π_ref of the completions [P, G], and of their tokens [P, G, T].
      scores: see `ScorePrograms`.
      warm_start, warm_start_step: params -> state, and (state, prompts, answers, answer_mask) -> (state, metrics).
    """

    start: Wrapped
    iterate: Wrapped | None
    sample: Wrapped
    learn: Wrapped
    sample_probe: Wrapped
    verify: Wrapped | None
    log_ratios: Wrapped
    scores: ScorePrograms
    warm_start: Wrapped
    warm_start_step: Wrapped


def compile_recipe(
    recipe: Recipe,
    shapes: Any,
    mesh: Mesh,
    *,
    dtype: str,
    gather: str = "model",
    warm_optimizer: optax.GradientTransformation,
    precise: Policy | None = None,
    trained: Any | None = None,
) -> Compiled:
    """Jits the functions of a run; they are compiled at their first call.

    Args:
      recipe: of the run, not yet spread over the mesh.
      shapes: of the parameters, with shardings.
      mesh: the devices.
      dtype: of matrix products.
      gather: what is gathered at a time to decode, see `spread_sampling`.
      warm_optimizer: of the warm start.
      precise: the policy with float32 products, for differences of log-probabilities; None: the recipe's has them.
      trained: shapes of what is trained, with shardings; None: of the parameters.
    """
    trained = shapes if trained is None else trained
    rows, whole = row_sharding(mesh), replicated(mesh)
    decoding = partial(jax.jit, compiler_options=DECODING_OPTIONS.get(mesh.devices.flat[0].platform))
    recipe = recipe._replace(
        sample=spread_sampling(recipe.sample, mesh, dtype, gather=gather),
        layout=recipe.layout._replace(shards=row_shards(mesh)),
    )

    def compile_start(
        optimizer: optax.GradientTransformation, shapes: Any, *, keep_params: bool
    ) -> tuple[Wrapped, Any]:
        """params -> the state before the first step, and the state's shardings."""

        def start(params: Any) -> TrainState:
            # Copies: the state will be donated, and the parameters may still be needed.
            return init_state(jax.tree.map(jnp.copy, params), optimizer)

        shardings = parameter_shardings(jax.eval_shape(start, shapes), mesh)
        return jax.jit(start, out_shardings=shardings, donate_argnums=() if keep_params else 0), shardings

    # 0.0 stands for any learning rate: the optimizer's state does not depend on it.
    start, state_shardings = compile_start(recipe.optimizer(0.0), trained, keep_params=recipe.needs_reference)
    warm_start, warm_shardings = compile_start(warm_optimizer, shapes, keep_params=False)

    # With a verifier of tokens, many whole iterations are one program.
    iterate = verify = None
    if (verify_tokens := recipe.verify_tokens) is not None:
        verify = jax.jit(lambda rollout, *answers: verify_tokens(rollout.completions, rollout.mask, *answers))
        spread = partial(jax.lax.with_sharding_constraint, shardings=rows)
        iterate = decoding(
            partial(iterations, recipe, spread=spread), donate_argnums=0, out_shardings=(state_shardings, whole, whole)
        )

    def for_prompts(rollout: Rollout) -> Recipe:
        """The recipe for the prompts of a measurement, which need not be divisible by the devices."""
        return recipe._replace(layout=recipe.layout._replace(shards=row_shards(mesh, rollout.mask.shape[0])))

    @jax.jit
    def measured_log_ratios(
        params: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout
    ) -> tuple[jax.Array, jax.Array]:
        return log_ratios(for_prompts(rollout), params, ref_params, prompts, rollout)

    of_trained = parameter_shardings(trained, mesh)
    like_trained = partial(jax.jit, out_shardings=of_trained)

    @like_trained
    def pull_back(trained: Any, ref_params: Any, prompts: PromptBatch, rollout: Rollout, weights: jax.Array) -> Any:
        return scores.pull_back(for_prompts(rollout).of_trained(ref_params), trained, prompts, rollout, weights)

    @jax.jit
    def along(
        trained: Any, ref_params: Any, direction: Any, step: jax.Array, prompts: PromptBatch, rollout: Rollout
    ) -> jax.Array:
        exact = for_prompts(rollout)._replace(policy=precise or recipe.policy)
        return scores.along(exact.of_trained(ref_params), trained, direction, step, prompts, rollout)

    @partial(jax.jit, donate_argnums=0, out_shardings=(warm_shardings, whole))
    def warm_start_step(state: TrainState, *demonstrations: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        terms = lambda params, batch: demonstration_terms(  # noqa: E731
            recipe.policy, params, *batch, chunk_size=recipe.layout.chunk_size
        )
        return gradient_step(state, demonstrations, terms, optimizer=warm_optimizer)

    return Compiled(
        start=start,
        iterate=iterate,
        sample=decoding(recipe.sample, static_argnames="stages", out_shardings=rollout_shardings(rows, whole)),
        learn=jax.jit(partial(learn, recipe), donate_argnums=0, out_shardings=(state_shardings, whole)),
        sample_probe=decoding(recipe.sample, static_argnames=("group_size", "greedy", "stages")),
        verify=verify,
        log_ratios=measured_log_ratios,
        scores=ScorePrograms(
            pull_back=pull_back,
            along=along,
            moments=jax.jit(scores.moments, donate_argnums=1),
            whitening=jax.jit(scores.whitening),
            whiten=jax.jit(scores.whiten, out_shardings=(of_trained, whole)),
            add=like_trained(lambda x, scale, y: jax.tree.map(lambda x, y: x + scale * y, x, y), donate_argnums=0),
        ),
        warm_start=warm_start,
        warm_start_step=warm_start_step,
    )

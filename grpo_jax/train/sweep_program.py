"""The program of a sweep: the iterations of a run mapped over seeds and points, and spread over a mesh without communication."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.rollout import PromptBatch
from grpo_jax.train.iteration import Recipe, iterations, log_ratios
from grpo_jax.train.step import TrainState, init_state

AXES = ("seeds", "points")
POINTS = PartitionSpec(None, "sweep")  # arrays [seeds, points, ...]
WHOLE = PartitionSpec()

Table = tuple[PromptBatch, jax.Array, jax.Array]
"""(prompts, answers, answer_mask) of the whole task."""


class SweepFunctions(NamedTuple):
    """The jitted functions of a sweep; arrays of points lead with [seeds, points], and the points are spread over the mesh.

    Attributes:
      start: (reference parameters [seeds, ...], betas) -> states; betas say how many points there are.
      iterate: (states, ref_params or None, base_keys [seeds], index [seeds, n, P], table, count, first, betas, learning_rates)
        -> (states, metrics, skipped), as `iterations`.
      measure: (params, ref_params [seeds], keys [seeds], rows [seeds, blocks, P], table, first_sample) -> [..., blocks, P]
        successes, tokens and truncated completions of each prompt, and [..., blocks, P, 2, 4] the sums of powers of the
        log-ratios of failures and of successes.
    """

    start: Callable[..., TrainState]
    iterate: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]
    measure: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]


def make_sweep_functions(recipe: Recipe, mesh: Mesh, *, batch_samples: int, batched: bool) -> SweepFunctions:
    """Maps the functions of a run over seeds and points, and jits them for a mesh with the one axis "sweep".

    Args:
      recipe: of a run on one device, with a verifier of tokens.
      mesh: of `make_sweep_mesh`.
      batch_samples: completions of a prompt that are sampled at a time when a policy is measured.
      batched: the points of a device run side by side (`jax.vmap`), not one after the other.
    """
    # Side by side, the points of a device go through their loops together.
    if batched:
        recipe = recipe._replace(
            sample=partial(recipe.sample, vmap_axis=AXES), layout=recipe.layout._replace(vmap_axis=AXES)
        )
    spread = partial(over_points, mesh=mesh, batched=batched)

    # Each of the three, first for one point, then mapped over all.
    def start(ref_params: Any, betas: jax.Array) -> TrainState:
        of_point = lambda params, _: init_state(params, recipe.optimizer(0.0))  # noqa: E731
        return jax.vmap(lambda params, row: jax.vmap(partial(of_point, params))(row))(ref_params, betas)

    def iterate(
        states: Any,
        ref_params: Any,
        base_keys: Any,
        index: Any,
        table: Table,
        count: Any,
        first: Any,
        betas: Any,
        learning_rates: Any,
    ) -> Any:
        def of_point(shared: Any, of_seed: Any, point: Any) -> Any:
            table, count, first = shared
            ref_params, base_key, index = of_seed
            state, beta, rate = point
            return iterations(recipe, state, ref_params, table, index, count, base_key, first, beta, rate)

        return spread(of_point)((table, count, first), (ref_params, base_keys, index), (states, betas, learning_rates))

    def measure(params: Any, ref_params: Any, keys: Any, rows: Any, table: Table, first_sample: Any) -> Any:
        def of_point(shared: Any, of_seed: Any, params: Any) -> Any:
            table, first = shared
            ref_params, key, rows = of_seed
            of_rows = partial(count_outcomes, recipe, params, ref_params, table, key, first, batch_samples)
            return jax.lax.map(of_rows, rows)

        return spread(of_point)((table, first_sample), (ref_params, keys, rows), params)

    return SweepFunctions(
        start=jax.jit(start, out_shardings=NamedSharding(mesh, POINTS)),
        iterate=jax.jit(iterate, donate_argnums=0),
        measure=jax.jit(measure),
    )


def over_points(function: Callable[..., Any], *, mesh: Mesh, batched: bool) -> Callable[..., Any]:
    """(shared, of seeds [seeds, ...], of points [seeds, points, ...]) -> [seeds, points, ...], from a function of one point.

    Two maps, seeds outside and points inside, so that what the points of a seed share is not repeated. Points are spread over
    the mesh, without any communication.
    """
    if batched:
        inner = jax.vmap(function, in_axes=(None, None, 0), axis_name=AXES[1])
        every = jax.vmap(inner, in_axes=(None, 0, 0), axis_name=AXES[0])
    else:

        def every(shared: Any, of_seeds: Any, of_points: Any) -> Any:
            def points_of_seed(arrays: tuple) -> Any:
                of_seed, of_points = arrays
                return jax.lax.map(lambda point: function(shared, of_seed, point), of_points)

            return jax.lax.map(points_of_seed, (of_seeds, of_points))

    return jax.shard_map(every, mesh=mesh, in_specs=(WHOLE, WHOLE, POINTS), out_specs=POINTS, check_vma=False)


def make_sweep_mesh(points: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh of the most devices over which the points of a seed spread equally.

    >>> dict(make_sweep_mesh(15, jax.devices()[:1]).shape)
    {'sweep': 1}
    """
    devices = jax.devices() if devices is None else devices
    size = max(n for n in range(1, len(devices) + 1) if points % n == 0)
    return jax.make_mesh((size,), ("sweep",), devices=devices[:size], axis_types=(AxisType.Auto,))


def count_outcomes(
    recipe: Recipe,
    params: Any,
    ref_params: Any,
    table: Table,
    key: jax.Array,
    first_sample: jax.Array,
    group_size: int,
    rows: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of ``group_size`` samples of the prompts of some rows: successes, tokens and truncated completions [P], and [P, 2, 4]
    the sums of ℓ, ℓ², ℓ³, ℓ⁴ over failures and over successes, with ℓ = log π/π_ref."""
    assert recipe.verify_tokens is not None
    prompts, answers, answer_mask = jax.tree.map(lambda x: x[rows], table)
    rollout = recipe.sample(params, prompts, key, group_size=group_size, first_sample=first_sample)  # [P, G, T]
    correct = recipe.verify_tokens(rollout.completions, rollout.mask, answers, answer_mask)  # [P, G]
    counted = correct, rollout.mask, rollout.truncated
    counts = (x.reshape(len(rows), -1).sum(-1, dtype=jnp.int32) for x in counted)
    ratios, _ = log_ratios(recipe, params, ref_params, prompts, rollout)  # [P, G]
    powers = jnp.stack([ratios**power for power in (1, 2, 3, 4)], axis=-1)  # [P, G, 4]
    of_class = [jnp.where(mask[..., None], powers, 0.0).sum(1) for mask in (~correct, correct)]  # [P, 4] each
    return (*counts, jnp.stack(of_class, axis=1))  # type: ignore[return-value]

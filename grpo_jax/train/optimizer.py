"""The two optimizers of a run: that of GRPO, a function of a learning rate that may be traced, and that of the warm start."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_optimizer(
    *,
    updates: int,
    schedule: str,
    warmup_updates: int,
    b1: float,
    b2: float,
    weight_decay: float,
    max_grad_norm: float,
    averaged_updates: int = 0,
) -> Callable[[Any], optax.GradientTransformation]:
    """AdamW on a schedule that peaks at the learning rate, after clipping by the global norm.

    Args:
      updates: gradient steps of the whole run.
      schedule: "cosine" or "linear", which both reach 0 after the last update, or "constant".
      warmup_updates: linear from 0.
      b1, b2, weight_decay: of AdamW.
      max_grad_norm: gradients are scaled down to this global norm.
      averaged_updates: the last of ``updates`` after which `average_tail` averages the parameters; 0: none.

    Returns:
      learning rate -> optax transformation; its state is the same for every learning rate.
    """
    rates = partial(learning_rates, updates=updates, schedule=schedule, warmup_updates=warmup_updates)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        adamw = optax.adamw(rates(learning_rate), b1=b1, b2=b2, weight_decay=weight_decay)
        average = [average_tail(updates - averaged_updates)] if averaged_updates else []
        return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw, *average)

    return optimizer


def learning_rates(peak: Any, *, updates: int, schedule: str, warmup_updates: int) -> optax.Schedule:
    """The learning rate of each update, from 0 on; arguments as of `make_optimizer`.

    >>> rates = learning_rates(1.0, updates=6, schedule="linear", warmup_updates=2)
    >>> [float(rates(n)) for n in range(6)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    decay = max(updates - warmup_updates, 1)
    rates = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay),
        "constant": lambda: optax.constant_schedule(peak),
    }[schedule]()
    if warmup_updates:
        warmup = optax.linear_schedule(0.0, peak, warmup_updates)
        rates = optax.join_schedules([warmup, rates], [warmup_updates])
    return rates


class Average(NamedTuple):
    """The state of `average_tail`.

    Attributes:
      lag: like the parameters, the average less the parameters; 0 until the average begins.
      updates: int32, gradient steps applied.
    """

    lag: Any
    updates: jax.Array


def average_tail(start: int | jax.Array) -> optax.GradientTransformation:
    """Averages the parameters after every update from ``start`` + 1 on, with equal weights (Polyak–Ruppert).

    Last in a chain, it sees the updates as they are applied, and leaves them as they are. With the k-th parameters θ_k and their
    mean m_k it keeps d_k = m_k − θ_k = (1 − 1/k)(d_{k−1} − (θ_k − θ_{k−1})). In float32 its error is relative to d, which is
    small, and not to θ, so that a thousandth part of a small step is not lost. Updates that are skipped do not count, and leave
    the average so much shorter.

    Source: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) 838; the recursion is ours.

    >>> optimizer, params = optax.chain(optax.sgd(1.0), average_tail(1)), jnp.float32(0.0)
    >>> state = optimizer.init(params)
    >>> for gradient in jnp.float32([-1, -2, -4]):
    ...     updates, state = optimizer.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params.item(), averaged_params(params, state).item()  # 1, 3, 7, of which the last two are averaged
    (7.0, 5.0)
    """

    def init(params: Any) -> Average:
        return Average(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        count = state.updates + 1
        number = jnp.maximum(count - start, 1)  # of these parameters in the average

        def lag(old: jax.Array, theta: jax.Array, new: jax.Array) -> jax.Array:
            # new − theta is the step with theta's rounding, which the update itself does not have.
            return (1 - 1 / number.astype(old.dtype)) * (old - (new - theta))

        return updates, Average(jax.tree.map(lag, state.lag, params, optax.apply_updates(params, updates)), count)

    return optax.GradientTransformation(init, update)


def averaged_params(params: Any, opt_state: Any) -> Any | None:
    """The average, from the parameters and the state of an optimizer of `make_optimizer`; None where it keeps none."""
    return jax.tree.map(jnp.add, params, opt_state[-1].lag) if isinstance(opt_state[-1], Average) else None


def make_warm_start_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW at a constant learning rate, without weight decay."""
    return optax.adamw(learning_rate, weight_decay=0.0)

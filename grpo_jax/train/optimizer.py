"""The two optimizers of a run: that of GRPO, a function of a learning rate that may be traced, and that of the warm start."""

from collections.abc import Callable
from functools import partial
from typing import Any

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
) -> Callable[[Any], optax.GradientTransformation]:
    """AdamW on a schedule that peaks at the learning rate, after clipping by the global norm.

    Args:
      updates: gradient steps of the whole run.
      schedule: "cosine" or "linear", which both reach 0 after the last update, or "constant".
      warmup_updates: linear from 0.
      b1, b2, weight_decay: of AdamW.
      max_grad_norm: gradients are scaled down to this global norm.

    Returns:
      learning rate -> optax transformation; its state is the same for every learning rate.
    """
    rates = partial(learning_rates, updates=updates, schedule=schedule, warmup_updates=warmup_updates)

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        adamw = optax.adamw(rates(learning_rate), b1=b1, b2=b2, weight_decay=weight_decay)
        return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)

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


def make_warm_start_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW at a constant learning rate, without weight decay."""
    return optax.adamw(learning_rate, weight_decay=0.0)

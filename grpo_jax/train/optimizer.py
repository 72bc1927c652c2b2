"""The two optimizers of a run: that of GRPO, a function of a learning rate that may be traced, and that of the warm start."""

from collections.abc import Callable
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
    decay = max(updates - warmup_updates, 1)
    after_warmup = {
        "cosine": lambda peak: optax.cosine_decay_schedule(peak, decay),
        "linear": lambda peak: optax.linear_schedule(peak, 0.0, decay),
        "constant": optax.constant_schedule,
    }[schedule]

    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        rates = after_warmup(learning_rate)
        if warmup_updates:
            warmup = optax.linear_schedule(0.0, learning_rate, warmup_updates)
            rates = optax.join_schedules([warmup, rates], [warmup_updates])
        adamw = optax.adamw(rates, b1=b1, b2=b2, weight_decay=weight_decay)
        return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)

    return optimizer


def make_warm_start_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """AdamW at a constant learning rate, without weight decay."""
    return optax.adamw(learning_rate, weight_decay=0.0)

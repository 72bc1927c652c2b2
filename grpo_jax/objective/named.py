"""The named objectives: published losses as points of the product that `Objective` spans."""

from dataclasses import replace
from typing import Any

from grpo_jax.objective.objective import Objective

_UNCLIPPED: dict[str, Any] = {"clip_low": None, "clip_high": None}

GRPO = Objective()
"""The paper's: whitened with ε inside the root, ratio of whole completions, clipped, KL(π‖π_ref) of whole completions."""

DR_GRPO = Objective(scale="none")
"""Mean-only advantages (Dr. GRPO) with the paper's KL: one fixed point, no folds, no cycles. Source: arXiv 2503.20783."""

GRPO_TRL = Objective(ddof=1, epsilon_in="std", ratio="token", reduce="sequence_mean", kl="token_forward")
"""What TRL and its relatives run: ddof 1, std + 1e-4, token ratios, k3. Its β leads to p* − p_ref = S_G(p*)/β, not to the
paper's point (at β = 1, p_ref = 0.01, large G: 0.51 where the paper's KL gives 0.15)."""

DAPO = replace(GRPO_TRL, clip_high=0.28, reduce="token_mean", kl="none")
"""DAPO's loss: clip-higher, one denominator of all tokens, no KL: nothing holds the policy, and p* = 1. Source: arXiv 2503.14476;
not included: ``overlong="ignore"``, a softer punishment of length, and sampling dead groups again."""

BNPO = replace(GRPO_TRL, reduce="token_mean")
"""What TRL calls bnpo: its GRPO with one denominator of all tokens."""

GSPO = replace(GRPO_TRL, ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl="none")
"""GSPO: geometric-mean ratio of the completion, clipped narrowly, no KL: p* = 1. Source: arXiv 2507.18071."""

CISPO = replace(GRPO_TRL, **_UNCLIPPED, surrogate="cispo", ratio_cap=5.0, reduce="token_mean", kl="none")
"""CISPO: every token keeps its gradient, weighed by its ratio up to a cap; no KL: p* = 1. Source: arXiv 2506.13585, with the
cap of 2510.13786."""

SAPO = replace(GRPO_TRL, **_UNCLIPPED, surrogate="sapo", tau_plus=1.0, tau_minus=1.05, kl="none")
"""SAPO: a sigmoid in place of the clip, a little steeper for failures; no KL: p* = 1. Source: arXiv 2511.20347."""

RLOO = Objective(baseline="leave_one_out", scale="none")
"""Leave-one-out baseline with the paper's KL: Ω = 1 at every group size, so β needs no correction. Source: arXiv 2402.14740."""

MAXRL = Objective(scale="mean")
"""Advantages (r − mean)/mean with the paper's KL: rare successes weigh most, Ω ≈ 1/p. Source: arXiv 2602.02710."""

MIRROR_GRPO = Objective(anchor="previous", **_UNCLIPPED)
"""KL to the previous policy alone, weight β_mirror: p climbs to 1 at a pace set by β_mirror, and by no clip. Source: arXiv
2503.06639, §5."""

MIRROR_DR_GRPO = replace(MIRROR_GRPO, scale="none")
"""Mirror GRPO with mean-only advantages: the log-odds grow by (G−1)/(G β_mirror) per iteration. Source: arXiv 2503.06639, §5."""

TWO_KL_GRPO = Objective(anchor="both", **_UNCLIPPED)
"""KL to the reference (β) and to the previous policy (β_mirror): GRPO's fixed point at β, approached in smaller steps, of
share β/(β + β_mirror). Source: arXiv 2503.06639, §5."""

GPG = Objective(scale="none", ratio="none", **_UNCLIPPED, reduce="token_mean", kl="none")
"""The plain policy gradient of mean-only advantages, no ratio, no KL: p* = 1. Source: arXiv 2504.02546, without its factor
for dead groups."""

# Every objective above, by its name.
NAMED: dict[str, Objective] = {name: value for name, value in globals().items() if isinstance(value, Objective)}


def named_objective(name: str, **choices: Any) -> Objective:
    """A named objective with some of its choices changed.

    Args:
      name: a key of `NAMED`.
      **choices: fields of `Objective`; None keeps what the name says.

    Returns:
      The objective.

    Raises:
      ValueError: an unknown name, or choices that `Objective` refuses.
      TypeError: an unknown field.

    Source: a convention, ours.

    >>> named_objective("DR_GRPO", clip_low=None) == DR_GRPO, named_objective("GRPO", scale="none") == DR_GRPO
    (True, True)
    """
    if name not in NAMED:
        raise ValueError(f"objective {name!r} is not one of {', '.join(NAMED)}")
    return replace(NAMED[name], **{field: choice for field, choice in choices.items() if choice is not None})

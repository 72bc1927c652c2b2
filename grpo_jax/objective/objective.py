"""An objective is one choice per axis; published names are points of that product.

The description is frozen and hashable: it is a static argument of the jitted loss, and the run's prediction is derived from
it (`Objective.normaliser`), so what is predicted is what is trained.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from grpo_jax.objective.advantages import check_normaliser

RATIOS = ("token", "sequence_product")
REDUCTIONS = ("sequence_sum", "sequence_mean", "token_mean")
KLS = ("sequence_reverse", "token_reverse", "token_forward", "none")


FIXED_POINTS = {
    "sequence_reverse": "the paper's: logit p* = logit p_ref + Ω_G(p*)/β, with KL(π‖π_ref) of whole completions",
    "token_reverse": "near the paper's: token-wise KL(π‖π_ref) leaves out how a token changes the later KL",
    "token_forward": "that of KL(π_ref‖π), not the paper's: p* − p_ref = S_G(p*)/β",
    "none": "p* = 1: without a KL term nothing holds the policy",
}
"""Where each KL term leads; arXiv 2503.06639, Theorem 3, for the first, and the derivations in `theory` for the others."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is optimised: a group normaliser, a ratio, a clip, a reduction and a KL term named by what its gradient descends.

    Attributes:
      baseline, scale, epsilon, ddof, epsilon_in: the group normaliser; see `group_advantages`.
      ratio: "sequence_product" is π(o)/π_old(o) of whole completions (the paper's); "token" is one ratio per token (PPO's).
      clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; None leaves that side alone.
      reduce: "sequence_sum" sums the tokens of a completion and averages completions, so that the on-policy gradient is
        Ω_G(p)∇p; "sequence_mean" divides each completion by its length first (GRPO as first published); "token_mean" divides
        the sum of all tokens by their number (DAPO).
      kl: what ∇ of the term with β descends. "sequence_reverse": KL(π‖π_ref) of whole completions, exactly (importance
        corrected off-policy), the paper's; "token_reverse": Σ_t KL(π‖π_ref) of the tokens at the sampled prefixes (the k2
        estimator); "token_forward": Σ_t KL(π_ref‖π) of the tokens at the sampled prefixes (k3, what TRL and DeepSeek train),
        which ends at another fixed point; "none".

    Raises:
      ValueError: an unknown choice, a non-finite or negative epsilon, or a clip width that is not positive (or clip_low > 1).

    Source: arXiv 2503.06639, §2 (the normaliser, ratio and clip); the gradients of the KL terms are checked by enumeration in
    tests/objective.

    >>> GRPO.normaliser()["scale"], DR_GRPO.normaliser()["scale"]
    ('std', 'none')
    """

    baseline: str = "mean"
    scale: str = "std"
    epsilon: float = 1e-4
    ddof: int = 0
    epsilon_in: str = "variance"
    ratio: str = "sequence_product"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    reduce: str = "sequence_sum"
    kl: str = "sequence_reverse"

    def __post_init__(self) -> None:
        check_normaliser(baseline=self.baseline, scale=self.scale, ddof=self.ddof, epsilon_in=self.epsilon_in)
        if self.kl == "k1":
            raise ValueError(
                "kl='k1' in the loss has zero expected gradient: β would do nothing. Use 'sequence_reverse' for KL(π‖π_ref)"
            )
        choices = (("ratio", self.ratio, RATIOS), ("reduce", self.reduce, REDUCTIONS), ("kl", self.kl, KLS))
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon={self.epsilon} must be finite and not negative")
        for name, width, most in (("clip_low", self.clip_low, 1.0), ("clip_high", self.clip_high, math.inf)):
            if width is not None and not 0 < width <= most:
                raise ValueError(f"{name}={width} must be positive{' and at most 1' if most == 1 else ''}, or None")

    @property
    def kl_direction(self) -> str:
        """Which KL decides where training ends, as the theory names it: "reverse" KL(π‖π_ref), "forward" or "none"."""
        return {"token_forward": "forward", "none": "none"}.get(self.kl, "reverse")

    def normaliser(self) -> dict[str, Any]:
        """The keyword arguments of `group_advantages`, and of `theory.Group`, that this objective trains with."""
        return {
            "baseline": self.baseline,
            "scale": self.scale,
            "epsilon": self.epsilon,
            "ddof": self.ddof,
            "epsilon_in": self.epsilon_in,
        }


GRPO = Objective()
"""The paper's: whitened with ε inside the root, ratio of whole completions, clipped, KL(π‖π_ref) of whole completions."""

DR_GRPO = Objective(scale="none")
"""Mean-only advantages (Dr. GRPO) with the paper's KL: one fixed point, no folds, no cycles."""

GRPO_TRL = Objective(ddof=1, epsilon_in="std", ratio="token", reduce="sequence_mean", kl="token_forward")
"""What TRL and its relatives run: ddof 1, std + 1e-4, token ratios, k3. Its β leads to p* − p_ref = S_G(p*)/β, not to the
paper's point (at β = 1, p_ref = 0.01, large G: 0.51 where the paper's KL gives 0.15)."""

DAPO = Objective(ddof=1, epsilon_in="std", ratio="token", clip_high=0.28, reduce="token_mean", kl="none")
"""DAPO's loss: clip-higher, one denominator of all tokens, no KL: nothing holds the policy, and p* = 1."""

NAMED: dict[str, Objective] = {"GRPO": GRPO, "DR_GRPO": DR_GRPO, "GRPO_TRL": GRPO_TRL, "DAPO": DAPO}


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


def beta_effective(beta: float, *, objective: Objective, group_size: int) -> float:
    """The β of the paper's normaliser (population std, ddof 0) that the objective's conventions amount to.

    Scaling all advantages by s is training with β/s. ddof = 1 scales them by √((G−1)/G), a leave-one-out baseline by G/(G−1), and
    a mean baseline without scale by (G−1)/G relative to Ω = 1. What depends on p (the finite group, ε) is no rescaling
    of β and is left to ``theory.Group``.

    Args:
      beta: weight of the KL term in the loss.
      objective: what is trained.
      group_size: G.

    Source: derived; arXiv 2503.06639, §2 for the normaliser.

    >>> round(beta_effective(1.0, objective=GRPO_TRL, group_size=4), 4)
    1.1547
    """
    factor = (group_size - 1) / group_size
    if objective.scale == "std" and objective.ddof == 1:
        beta /= math.sqrt(factor)
    if objective.scale == "none" and objective.baseline != "none":
        beta /= factor
    if objective.baseline == "leave_one_out":
        beta *= factor
    return beta

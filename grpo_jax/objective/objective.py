"""An objective is one choice per axis.

The description is frozen and hashable. It is a static argument of the jitted loss, and a run's prediction is derived from it too
(`Objective.normaliser`), so what is predicted is what is trained.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from grpo_jax.objective.advantages import check_choice, check_normaliser, check_not_negative


class KLTerm(NamedTuple):
    """Where training ends with a KL term to the reference.

    Attributes:
      direction: which KL decides it, as the theory names it: "reverse" KL(π‖π_ref) or "forward" KL(π_ref‖π).
      end: the fixed point, in words.
    """

    direction: str
    end: str


_NEAR = "near the paper's: token-wise KL(π‖π_ref) leaves out how a token changes the later KL"
KL_TERMS = {
    "sequence_reverse": KLTerm(
        "reverse", "the paper's: logit p* = logit p_ref + Ω_G(p*)/β, with KL(π‖π_ref) of whole completions"
    ),
    "token_reverse": KLTerm("reverse", _NEAR),
    "token_reverse_weighted": KLTerm("reverse", _NEAR),
    "token_forward": KLTerm(
        "forward", "that of KL(π_ref‖π), not the paper's: p* − p_ref = S_G(p*)/β, exact where one token decides"
    ),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "kl": (*KL_TERMS, "none"),
    "ratio": ("token", "sequence", "sequence_product", "none"),
    "surrogate": ("clip", "cispo", "sapo"),
    "reduce": ("sequence_sum", "sequence_mean", "token_mean", "constant"),
    "anchor": ("reference", "previous", "both"),
    "correction": ("token", "sequence", "none"),
    "overlong": ("keep", "ignore"),
}
ABOVE_ZERO = ("clip_low", "clip_high", "tau_plus", "tau_minus", "constant_length", "correction_cap")
ABOVE_ONE = ("ratio_cap", "dual_clip")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is optimised, one choice per axis.

    Attributes:
      baseline, scale, epsilon, ddof, epsilon_in: the group normaliser; see `group_advantages`.
      ratio: what stands for π/π_old. "sequence_product": of whole completions (the paper's); "sequence": its geometric mean
        over the tokens, counted once per token, so that reduce="sequence_mean" is GSPO; "token": one per token (PPO's); "none":
        log π takes its place, for data from the current policy.
      surrogate: how the ratio ρ meets the advantage A, to be maximised. "clip": min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high)A);
        "cispo": sg(min(ρ, ratio_cap)) A log π, every token keeps a gradient; "sapo": (4/τ) σ(τ(ρ − 1)) A, a soft clip with
        τ = tau_plus for A > 0 and tau_minus otherwise.
      clip_low, clip_high: None leaves that side alone. For "cispo", clip_low bounds its weight from below.
      ratio_cap: above 1, an absolute ratio. For "cispo" its cap; for "clip" an upper bound δ of the unclipped branch, so that a
        failure that became likely does not push without limit (INTELLECT-2).
      dual_clip: above 1; for A < 0 the surrogate is at least dual_clip·A.
      tau_plus, tau_minus: temperatures of "sapo".
      reduce: "sequence_sum" sums the tokens of a completion and averages completions, so that the on-policy gradient is
        Ω_G(p)∇p; "constant" does so and divides by ``constant_length``, which leaves every fixed point in place;
        "sequence_mean" divides each completion by its own length (GRPO as first published); "token_mean" divides the sum of all
        tokens by their number (DAPO). These two weigh completions by their length, in all terms alike.
      constant_length: tokens; for reduce="constant" alone.
      kl: what the gradient of the KL term descends, on data from π_old = π. "sequence_reverse": KL(π‖anchor) of whole
        completions, exact, also off-policy; this is the paper's; "token_reverse": Σ_t KL(π‖anchor) of the tokens at the sampled
        prefixes (the k2 estimator); "token_reverse_weighted": the same KL by ratio·k3; off-policy its gradient stays right, at
        prefixes from π_old; "token_forward": Σ_t KL(anchor‖π) of the tokens at the sampled prefixes (k3, what TRL and DeepSeek
        train), which ends at another fixed point; "none".
      anchor: whom the KL holds to: "reference" (weight β), the "previous" policy π_old (weight β_mirror: mirror GRPO), or "both"
        (two-KL GRPO).
      correction: weighs terms by min(π_old/π_sampler, correction_cap), where the sampler's arithmetic differs from the trainer's:
        per "token", per "sequence" (geometric mean), or "none".
      overlong: "ignore" gives completions that ran out of length no advantage; the KL still holds them. "keep" takes their
        rewards as they are.

    Raises:
      ValueError: an unknown choice, or choices that make no sense together, with the reason.

    Source: arXiv 2503.06639, §2 and §5, for normaliser, ratio, clip and the anchors; 2507.18071 (GSPO), 2506.13585 (CISPO),
    2511.20347 (SAPO), 1912.09729 (dual clip), 2505.07291 (ratio cap), 2503.14476 (DAPO, overlong). The gradients of the KL terms
    are checked by enumeration in tests/objective.

    >>> Objective(scale="none").normaliser()["scale"]
    'none'
    """

    baseline: str = "mean"
    scale: str = "std"
    epsilon: float = 1e-4
    ddof: int = 0
    epsilon_in: str = "variance"
    ratio: str = "sequence_product"
    surrogate: str = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    ratio_cap: float | None = None
    dual_clip: float | None = None
    tau_plus: float | None = None
    tau_minus: float | None = None
    reduce: str = "sequence_sum"
    constant_length: int | None = None
    kl: str = "sequence_reverse"
    anchor: str = "reference"
    correction: str = "none"
    correction_cap: float | None = None
    overlong: str = "keep"

    def __post_init__(self) -> None:
        check_normaliser(**self.normaliser())
        if self.kl == "k1":
            raise ValueError(
                "kl='k1' in the loss has zero expected gradient: β would do nothing. Use 'sequence_reverse' for KL(π‖π_ref)"
            )
        for field, choices in CHOICES.items():
            check_choice(field, getattr(self, field), choices)
        for is_wrong, reason in _faults(self):
            if is_wrong:
                raise ValueError(reason)

    @property
    def holds_to_reference(self) -> bool:
        """Whether β weighs a KL to the reference, which then needs ``ref_logps``."""
        return self.kl != "none" and self.anchor != "previous"

    @property
    def holds_to_previous(self) -> bool:
        """Whether β_mirror weighs a KL to the previous policy, which then needs ``old_logps``."""
        return self.kl != "none" and self.anchor != "reference"

    @property
    def kl_direction(self) -> str:
        """Which KL decides where training ends, as the theory names it: "reverse" KL(π‖π_ref), "forward" or "none"."""
        return KL_TERMS[self.kl].direction if self.holds_to_reference else "none"

    @property
    def is_predicted(self) -> bool:
        """Whether the theory knows where β takes this objective; where not, `fixed_point` says why."""
        return not self._unpredictable

    @property
    def _unpredictable(self) -> list[str]:
        """What moves the end of training in a way that the theory does not cover."""
        by_length = self.baseline == "none" and self.reduce in ("sequence_mean", "token_mean")
        reasons = [
            (by_length, "weighing completions by their length moves it where advantages have no baseline"),
            (self.overlong == "ignore", "completions that are cut off and have no advantage move it"),
            (self.scale == "batch_std", "the std of the whole batch couples the prompts"),
        ]
        return [reason for holds, reason in reasons if holds]

    @property
    def fixed_point(self) -> str:
        """Where training ends, in words; arXiv 2503.06639, Theorems 3 and 4, and the derivations in `theory`."""
        if self.kl == "none":
            return "p* = 1: without a KL term nothing holds the policy"
        if self.anchor == "previous":
            return "p* = 1: a KL to the previous policy alone sets the pace and not the end (mirror)"
        end = KL_TERMS[self.kl].end
        if self.anchor == "both":
            end += "; the KL to the previous policy sets the pace"
        return end + "".join(f"; {reason}: no p* is predicted" for reason in self._unpredictable)

    def normaliser(self) -> dict[str, Any]:
        """The keyword arguments of `group_advantages`, and of `theory.Group`, that this objective trains with.

        `theory.Group` refuses scale="batch_std": that std is a property of the batch and not of one prompt.
        """
        return {
            "baseline": self.baseline,
            "scale": self.scale,
            "epsilon": self.epsilon,
            "ddof": self.ddof,
            "epsilon_in": self.epsilon_in,
        }


def _faults(o: Objective) -> list[tuple[bool, str]]:
    """(whether it is wrong, what to say) for every combination that makes no sense."""

    def unread(field: str, is_read: bool, reader: str) -> tuple[bool, str]:
        value = getattr(o, field)
        return value is not None and not is_read, f"{field}={value} is not read: it belongs to {reader}"

    def not_above(bound: int, field: str) -> tuple[bool, str]:
        value = getattr(o, field)
        is_above = type(value) in (int, float) and bound < value < math.inf
        return value is not None and not is_above, f"{field}={value} must be finite and above {bound}"

    clips, cispo, sapo = o.surrogate == "clip" and o.ratio != "none", o.surrogate == "cispo", o.surrogate == "sapo"
    sequence_kl, corrected = o.kl == "sequence_reverse", o.correction != "none"
    high = o.clip_high or 0.0
    return [
        # surrogates that do not go with the ratio, or lack what they need
        (
            o.ratio == "none" and o.surrogate != "clip",
            f"surrogate={o.surrogate!r} bounds a ratio, and ratio='none' has none",
        ),
        (
            cispo and o.ratio != "token",
            f"surrogate='cispo' weighs tokens by their own ratios: ratio={o.ratio!r} has none",
        ),
        (cispo and o.ratio_cap is None, "surrogate='cispo' needs ratio_cap, an absolute ratio above 1 (5.0, say)"),
        (
            cispo and o.reduce == "sequence_sum",
            "surrogate='cispo' with reduce='sequence_sum' is A·log π of whole completions, which grows with their length: take a "
            "mean over tokens, or reduce='constant' with the constant_length it is measured in",
        ),
        (sapo and None in (o.tau_plus, o.tau_minus), "surrogate='sapo' needs tau_plus and tau_minus (1.0 and 1.05)"),
        # numbers that nothing reads
        unread("clip_low", clips or cispo, "surrogate='clip' and 'cispo', with a ratio (GPG and SAPO start without)"),
        unread("clip_high", clips, "surrogate='clip' with a ratio; the upper bound of 'cispo' is ratio_cap"),
        unread("ratio_cap", clips or cispo, "surrogate='clip' and 'cispo', with a ratio"),
        unread("dual_clip", clips, "surrogate='clip' with a ratio"),
        unread("tau_plus", sapo, "surrogate='sapo'"),
        unread("tau_minus", sapo, "surrogate='sapo'"),
        unread("constant_length", o.reduce == "constant", "reduce='constant'"),
        unread("correction_cap", corrected, "correction='token' and 'sequence'"),
        # numbers out of their range
        *(not_above(0, field) for field in ABOVE_ZERO),
        *(not_above(1, field) for field in ABOVE_ONE),
        (o.clip_low is not None and o.clip_low > 1, f"clip_low={o.clip_low} must be at most 1, which never clips"),
        (
            clips and (o.ratio_cap or math.inf) <= 1 + high,
            f"ratio_cap={o.ratio_cap} must lie above 1 + clip_high={high}",
        ),
        (o.reduce == "constant" and o.constant_length is None, "reduce='constant' needs constant_length, in tokens"),
        (type(o.constant_length) is float, f"constant_length={o.constant_length} must be a whole number of tokens"),
        # the correction and the anchor
        (corrected and o.correction_cap is None, f"correction={o.correction!r} needs correction_cap (2.0, say)"),
        (
            o.correction == "token" and (o.ratio in ("sequence", "sequence_product") or sequence_kl),
            f"correction='token' cannot weigh ratio={o.ratio!r} with kl={o.kl!r}, which are of whole completions: use 'sequence'",
        ),
        (o.kl == "none" and o.anchor != "reference", f"anchor={o.anchor!r} needs a KL, and kl='none' has none"),
    ]


def beta_effective(beta: float | jax.Array, *, objective: Objective, group_size: int) -> float | jax.Array:
    """The β that would act the same if advantages used the mean and std of the whole population instead of the group's.

    Scaling all advantages by s is training with β/s. ddof = 1 scales them by √((G−1)/G), a leave-one-out baseline by G/(G−1), and
    a mean baseline without a scale of the group by (G−1)/G relative to the population. What depends on p (the finite group, ε)
    is no rescaling of β and is left to ``theory.Group``; β of different scales do not compare.

    Args:
      beta: weight of the KL term in the loss; may be traced.
      objective: what is trained.
      group_size: G, at least 2.

    Returns:
      The effective β, of the type of ``beta``.

    Raises:
      ValueError: a group smaller than 2, or a beta that is negative or not finite.

    Source: derived; arXiv 2503.06639, §2 for the normaliser.

    >>> round(beta_effective(1.0, objective=Objective(ddof=1), group_size=4), 4)
    1.1547
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be at least 2")
    check_not_negative("beta", beta)
    factor = (group_size - 1) / group_size
    if objective.scale == "std" and objective.ddof == 1:
        beta = beta / math.sqrt(factor)
    if objective.scale in ("none", "batch_std") and objective.baseline != "none":
        beta = beta / factor
    if objective.baseline == "leave_one_out":
        beta = beta * factor
    return beta

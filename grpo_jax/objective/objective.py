"""An objective is one choice per axis.

The description is frozen and hashable: it is a static argument of the jitted loss, and the run's prediction is derived from
it (`Objective.normaliser`), so what is predicted is what is trained.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from grpo_jax.objective.advantages import check_normaliser

RATIOS = ("token", "sequence", "sequence_product", "none")
SURROGATES = ("clip", "cispo", "sapo")
REDUCTIONS = ("sequence_sum", "sequence_mean", "token_mean", "constant")
KLS = ("sequence_reverse", "token_reverse", "token_reverse_weighted", "token_forward", "none")
ANCHORS = ("reference", "previous", "both")
CORRECTIONS = ("token", "sequence", "none")
OVERLONG = ("keep", "ignore")


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
      kl: what ∇ of a KL term descends, with data from π_old = π. "sequence_reverse": KL(π‖anchor) of whole completions,
        exactly, and off-policy too, the paper's; "token_reverse": Σ_t KL(π‖anchor) of the tokens at the sampled prefixes (the k2
        estimator); "token_reverse_weighted": the same by ratio·k3, which stays the gradient off-policy, at the prefixes of
        π_old; "token_forward": Σ_t KL(anchor‖π) of the tokens at the sampled prefixes (k3, what TRL and DeepSeek train),
        which ends at another fixed point; "none".
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
        _refuse(_faults(self))

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
        if not self.holds_to_reference:
            return "none"
        return "forward" if self.kl == "token_forward" else "reverse"

    @property
    def is_predicted(self) -> bool:
        """Whether the theory knows where β takes this objective: see `fixed_point` for why not."""
        coupled, cut_off = self.scale == "batch_std", self.overlong == "ignore"
        return not (coupled or cut_off or self._weighs_uncentred)

    @property
    def _weighs_uncentred(self) -> bool:
        return self.baseline == "none" and self.reduce in ("sequence_mean", "token_mean")

    @property
    def fixed_point(self) -> str:
        """Where training ends, in words; arXiv 2503.06639, Theorems 3 and 4, and the derivations in `theory`."""
        if self.kl == "none":
            return "p* = 1: without a KL term nothing holds the policy"
        if self.anchor == "previous":
            return "p* = 1: a KL to the previous policy alone sets the pace and not the end (mirror)"
        end = {
            "sequence_reverse": "the paper's: logit p* = logit p_ref + Ω_G(p*)/β, with KL(π‖π_ref) of whole completions",
            "token_forward": "that of KL(π_ref‖π), not the paper's: p* − p_ref = S_G(p*)/β, exact where one token decides",
        }.get(self.kl, "near the paper's: token-wise KL(π‖π_ref) leaves out how a token changes the later KL")
        if self.anchor == "both":
            end += "; the KL to the previous policy sets the pace"
        if self._weighs_uncentred:
            end += (
                "; weighing completions by their length moves it where advantages have no baseline: no p* is predicted"
            )
        if self.overlong == "ignore":
            end += "; completions that are cut off and have no advantage move it: no p* is predicted"
        if self.scale == "batch_std":
            end += "; the std of the whole batch couples the prompts: no p* is predicted"
        return end

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


def _refuse(faults: list[tuple[bool, str]]) -> None:
    for holds, reason in faults:
        if holds:
            raise ValueError(reason)


def _faults(o: Objective) -> list[tuple[bool, str]]:
    """(whether it holds, what is wrong and what to do)."""
    choices = {
        "ratio": RATIOS,
        "surrogate": SURROGATES,
        "reduce": REDUCTIONS,
        "anchor": ANCHORS,
        "correction": CORRECTIONS,
        "overlong": OVERLONG,
    }
    k1 = "kl='k1' in the loss has zero expected gradient: β would do nothing. Use 'sequence_reverse' for KL(π‖π_ref)"
    faults = [(o.kl == "k1", k1), _unknown("kl", o.kl, KLS)]
    faults += [_unknown(name, getattr(o, name), allowed) for name, allowed in choices.items()]
    _refuse(faults)

    def only(field: str, used: bool, where: str) -> tuple[bool, str]:
        return not used and getattr(
            o, field
        ) is not None, f"{field}={getattr(o, field)} is not read: it belongs to {where}"

    def above(field: str, least: float) -> tuple[bool, str]:
        value = getattr(o, field)
        number = type(value) in (int, float) and least < value < math.inf
        return value is not None and not number, f"{field}={value} must be finite and above {least:g}"

    clips, cispo, sapo = o.surrogate == "clip" and o.ratio != "none", o.surrogate == "cispo", o.surrogate == "sapo"
    sequence_kl, corrected = o.kl == "sequence_reverse", o.correction != "none"
    high = o.clip_high or 0.0
    return [
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
        only("clip_low", clips or cispo, "surrogate='clip' and 'cispo', with a ratio (GPG and SAPO start without)"),
        only("clip_high", clips, "surrogate='clip' with a ratio; the upper bound of 'cispo' is ratio_cap"),
        only("ratio_cap", clips or cispo, "surrogate='clip' and 'cispo', with a ratio"),
        only("dual_clip", clips, "surrogate='clip' with a ratio"),
        only("tau_plus", sapo, "surrogate='sapo'"),
        only("tau_minus", sapo, "surrogate='sapo'"),
        only("constant_length", o.reduce == "constant", "reduce='constant'"),
        only("correction_cap", corrected, "correction='token' and 'sequence'"),
        above("clip_low", 0.0),
        (o.clip_low is not None and o.clip_low > 1, f"clip_low={o.clip_low} must be at most 1, which never clips"),
        above("clip_high", 0.0),
        above("ratio_cap", 1.0),
        (
            clips and (o.ratio_cap or math.inf) <= 1 + high,
            f"ratio_cap={o.ratio_cap} must lie above 1 + clip_high={high}",
        ),
        above("dual_clip", 1.0),
        above("tau_plus", 0.0),
        above("tau_minus", 0.0),
        (o.reduce == "constant" and o.constant_length is None, "reduce='constant' needs constant_length, in tokens"),
        above("constant_length", 0),
        (type(o.constant_length) is float, f"constant_length={o.constant_length} must be a whole number of tokens"),
        (corrected and o.correction_cap is None, f"correction={o.correction!r} needs correction_cap (2.0, say)"),
        above("correction_cap", 0.0),
        (
            o.correction == "token" and (o.ratio in ("sequence", "sequence_product") or sequence_kl),
            f"correction='token' cannot weigh ratio={o.ratio!r} with kl={o.kl!r}, which are of whole completions: use 'sequence'",
        ),
        (o.kl == "none" and o.anchor != "reference", f"anchor={o.anchor!r} needs a KL, and kl='none' has none"),
    ]


def _unknown(name: str, value: Any, allowed: tuple[str, ...]) -> tuple[bool, str]:
    return value not in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}"


def beta_effective(beta: float | jax.Array, *, objective: Objective, group_size: int) -> float | jax.Array:
    """The β with which the same scale, taken with population statistics, would act alike.

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
    if not isinstance(beta, jax.Array) and not 0 <= beta < math.inf:
        raise ValueError(f"beta={beta} must be finite and not negative")
    factor = (group_size - 1) / group_size
    if objective.scale == "std" and objective.ddof == 1:
        beta = beta / math.sqrt(factor)
    if objective.scale in ("none", "batch_std") and objective.baseline != "none":
        beta = beta / factor
    if objective.baseline == "leave_one_out":
        beta = beta * factor
    return beta

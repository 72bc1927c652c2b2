"""Where a run stands, in one word and in a sentence: both follow from the numbers of its result."""

from typing import Any

import numpy as np
from scipy.special import stdtrit

ARRIVED, UNFINISHED, NOISY, LIMITED, ABOVE = "arrived", "not arrived", "noise", "limited", "above"
COLLAPSED, HOPELESS, UNKNOWN = "collapsed", "nothing to learn", "unknown"

CLOSE = 0.1  # a share of the hold, of the KL, or of the way to p*, below which a difference is not worth a word
BLOCKS = 5  # of a quarter of a run, whose means tell how far chance moves the mean of the quarter


def standing(result: dict[str, Any], before: dict[str, Any]) -> str:
    """One word for where a run stands.

    At rest, the push of the reward along the ray from the reference to the policy equals the hold of the KL, whatever the
    network lets through. So a policy short of p* has not arrived where the push is larger, or where its success still rises;
    it is shaken by noise where the hold is larger; and where they are equal it is held back by what the network lets through.

    Args:
      result: p_ref, p_final, and where there are: difference, ledger, trend.
      before: counts of the reference.

    Returns:
      "nothing to learn": the reference solved all prompts always or none ever.  "collapsed": success fell.  "arrived": p̂ is
      inside the prediction interval.  "above": beyond it.  "not arrived", "noise", "limited": below it, for that reason.
      "unknown": there is no prediction, or no log-ratios were measured.
    """
    successes, trials = before["successes"], before["trials"]
    if all(k in (0, trials) for k in successes):
        return HOPELESS
    if result["p_final"]["high"] < result["p_ref"]["low"]:
        return COLLAPSED
    difference, ledger = result.get("difference"), result.get("ledger", {})
    if difference is None:
        return UNKNOWN
    if difference["inside"]:
        return ARRIVED
    if difference["mean"] > 0:
        return ABOVE
    if "slope" not in ledger:
        return UNKNOWN
    slope, hold = ledger["slope"], ledger["hold"]["mean"]
    rising, to_go = result.get("trend"), -difference["mean"]
    if slope["low"] > 0 and slope["mean"] > CLOSE * hold:
        return UNFINISHED
    if rising and rising["low"] > 0 and rising["mean"] > CLOSE * to_go:
        return UNFINISHED
    if slope["high"] < 0 and slope["mean"] < -CLOSE * hold and ledger["beyond_rest"]["low"] > 0:
        return NOISY
    return LIMITED


def trend(rewards: np.ndarray, pace: np.ndarray, confidence: float) -> dict[str, float] | None:
    """By how much success rose from the third quarter of a run to the fourth, with its interval.

    Quarters are of the iterations weighed by their learning rate, so that a rate that decays does not make a run look settled.
    The error of a quarter's mean comes from the means of five blocks of it, which also holds what rewards have in common for a
    while; Student's t with 8 degrees of freedom.

    Args:
      rewards: [n] mean reward of each iteration.
      pace: [n + 1] iterations at the peak learning rate that 0 … n iterations are worth.
      confidence: of the interval.

    Returns:
      {"mean", "low", "high"}, or None for a run too short for blocks.

    >>> change = trend(np.linspace(0.0, 1.0, 80), np.arange(81.0), 0.95)
    >>> round(change["mean"], 3), change["low"] > 0
    (0.253, True)
    """
    half, three_quarters = (int(np.searchsorted(pace[1:], share * pace[-1])) for share in (0.5, 0.75))
    quarters = [rewards[half:three_quarters], rewards[three_quarters:]]
    if min(map(len, quarters)) < BLOCKS:
        return None
    means = [np.array([block.mean() for block in np.array_split(quarter, BLOCKS)]) for quarter in quarters]
    change = float(means[1].mean() - means[0].mean())
    error = np.sqrt(sum(blocks.var(ddof=1) / BLOCKS for blocks in means))
    half_width = float(stdtrit(2 * BLOCKS - 2, (1 + confidence) / 2) * error)
    return {"mean": change, "low": change - half_width, "high": change + half_width}


def in_words(result: dict[str, Any]) -> str:
    """The sentence that goes with the word of `standing`, from the numbers of a result."""
    ledger, standing = result.get("ledger", {}), result["standing"]
    p_ref, p_final = result["p_ref"]["mean"], result["p_final"]["mean"]
    followed = f"{ledger['followed']['mean']:.2f} of the pull of the reward" if "followed" in ledger else ""
    if standing == HOPELESS:
        side = "never solved" if p_ref < 0.5 else "always solved"
        if 0 < p_ref < 1:
            side = "either always or never solved"
        return f"nothing to learn: every prompt was {side}, and groups of equal rewards teach nothing"
    if standing == COLLAPSED:
        climbed = f" and the objective is at {ledger['objective']['mean']:+.3f}, below its start" * _is_below_start(
            ledger
        )
        advice = (
            "lower optimizer.learning_rate, raise objective.beta, or look at the samples for what is rewarded instead"
        )
        return f"collapsed: success fell from {p_ref:.3f} to {p_final:.3f}{climbed}; {advice}"
    if standing == UNKNOWN:
        why = "log-ratios were not measured" if "difference" in result else "there is no prediction to compare with"
        return f"where it stands is not known: {why}"
    if standing == ARRIVED:
        return f"arrived: the success probability is where β takes it{_wasted(ledger)}"
    if standing == ABOVE:
        return (
            f"above p*: prompts that share parameters helped each other, or p_ref was measured too low{_wasted(ledger)}"
        )
    if standing == UNFINISHED:
        to_go = result.get("speed", {}).get("iterations_to_go")
        more = f": about {to_go:,.0f} iterations to go at the speed of this run" if to_go else ""
        why = "the objective still rises on the way from the reference"
        if not ledger["slope"]["low"] > 0:
            why = f"success still rises, by {result['trend']['mean']:+.3f} over the last quarter of the run"
        return (
            f"not arrived yet{more}. It has followed {followed}, and {why}: more iterations or a larger learning rate take it "
            "further"
        )
    if standing == NOISY:
        start = ", and the objective is below its start" * _is_below_start(ledger)
        return (
            f"noise: {ledger['beyond_rest']['mean']:.3f} nats of KL more than a rest point with this success spends{start}. "
            "A rate that decays or is lower, larger batches or train.average take them back; more iterations do not. What keeps "
            f"success below p* is what the network lets through: it has followed {followed}"
        )
    still = f", and success moved by {result['trend']['mean']:+.3f} in the last quarter" if result.get("trend") else ""
    return (
        f"limited by the network: push and hold are in balance{still}. What it lets through at this learning rate is "
        f"{followed}: more iterations like these do not take it further; a larger model, or another rate, may"
    )


def _is_below_start(ledger: dict[str, Any]) -> bool:
    return "objective" in ledger and ledger["objective"]["high"] < 0


def _wasted(ledger: dict[str, Any]) -> str:
    """What more there is to say of a KL of which a notable share, beyond what its interval explains, bought no success."""
    if "kl" not in ledger:
        return ""
    kl, useful = ledger["kl"]["mean"], ledger["useful"]["mean"]
    parts = {name: ledger[f"within_{name}"] for name in ("successes", "failures")}
    if kl - useful < CLOSE * kl or not any(part["low"] > 0 for part in parts.values()):
        return ""
    inside = ", ".join(f"{part['mean']:.3f} within {name}" for name, part in parts.items())
    return f"; {kl - useful:.3f} of its {kl:.3f} nats of KL bought no success ({inside})"

"""Where a run stands, in one word and in a sentence: both follow from the numbers of its result."""

from typing import Any

import numpy as np
from scipy.special import stdtrit

ARRIVED, UNFINISHED, NOISY, LIMITED, ABOVE = "arrived", "not arrived", "noise", "limited", "above"
COLLAPSED, HOPELESS, UNKNOWN = "collapsed", "nothing to learn", "unknown"

CLOSE = 0.1  # a share of the hold, of the KL, or of the way to p*, below which a difference is not worth a word
UNSURE = 3  # times that share: a wider interval of push − hold does not tell whether they are in balance
NOTHING = 0.1  # a share of the reference's success that is next to none
FAR = 10.0  # times the predicted KL, which is far too much
BLOCKS = 5  # of a quarter of a run, whose means tell how far chance moves the mean of the quarter


def standing(result: dict[str, Any], before: dict[str, Any]) -> str:
    """One word for where a run stands.

    At rest, the push of the reward along the ray from the reference to the policy equals the hold of the KL, whatever the
    network lets through. So a policy has not arrived where the push is larger, or where its success still rises; it is shaken
    by noise where the hold is larger; and short of p* with the two in balance it is held back by what the network lets through.

    Args:
      result: p_ref, p_final, and where there are: difference, ledger, trend.
      before: counts of the reference.

    Returns:
      "nothing to learn": the reference solved each prompt always or never, and nothing was gained.  "collapsed": success fell by
      a tenth or more.  "arrived": p̂ is inside the prediction interval, and the push is not clearly larger.  "above": p̂ is
      beyond it.  "not arrived", "noise", "limited": p̂ is below it, for that reason.  "unknown": there is no prediction, push
      and hold are not known, or too few samples tell them apart.
    """
    successes, trials = before["successes"], before["trials"]
    p_ref, p_final = result["p_ref"], result["p_final"]
    if all(k in (0, trials) for k in successes) and p_final["low"] <= p_ref["mean"]:
        return HOPELESS
    if p_final["high"] < p_ref["low"] and p_final["mean"] < (1 - CLOSE) * p_ref["mean"]:
        return COLLAPSED
    difference, ledger = result.get("difference"), result.get("ledger", {})
    if difference is None:
        return UNKNOWN

    # Push and hold, where they are known: slope is their difference.
    slope = ledger.get("slope", {"mean": 0.0, "low": -np.inf, "high": np.inf})
    close = CLOSE * ledger["hold"]["mean"] if "hold" in ledger else 0.0
    pushed = slope["low"] > 0 and slope["mean"] > close
    held = slope["high"] < 0 and slope["mean"] < -close
    if difference["inside"] or difference["mean"] > 0:
        return UNFINISHED if pushed else ARRIVED if difference["inside"] else ABOVE
    if pushed:
        return UNFINISHED
    if held:
        return NOISY
    rising = result.get("trend")
    if rising and rising["low"] > 0 and rising["mean"] > CLOSE * -difference["mean"]:
        return UNFINISHED
    is_known = -UNSURE * close < slope["low"] and slope["high"] < UNSURE * close
    return LIMITED if is_known else UNKNOWN


def collapse(rows: list[dict[str, Any]], p_ref: float, kl_predicted: float | None) -> str | None:
    """What has collapsed at the last two measurements, in words; None where nothing has, or two have not been made.

    Success is below the reference's at both, and one of these is so: success is next to nothing, the KL is many times what is
    spent at p*, or the policy's entropy is next to nothing. What falls once and recovers is none.

    Args:
      rows: of metrics.jsonl so far.
      p_ref: mean success probability of the reference.
      kl_predicted: nats at p*; None where there is no prediction.

    >>> low = {"phase": "probe", "success/high": 0.01, "success/mean": 0.0, "kl/sequence": 9.0}
    >>> collapse([low | {"iteration": 0}, low | {"iteration": 5}, low | {"iteration": 10}], 0.4, 0.25)
    'success has fallen from 0.400 to 0.000, and KL is 9.00 nats, 36 times what p* takes'
    """
    probes = [row for row in rows if row["phase"] == "probe" and row["iteration"] > 0][-2:]
    if len(probes) < 2 or any(probe["success/high"] >= p_ref for probe in probes):
        return None
    entropies = [
        row["policy/entropy"] for row in rows if row["phase"] == "train" and row.get("policy/entropy") is not None
    ]
    p, kl = probes[-1]["success/mean"], probes[-1].get("kl/sequence")
    found = []
    if all(probe["success/high"] < NOTHING * p_ref for probe in probes) or p == 0:
        found.append(f"success has fallen from {p_ref:.3f} to {p:.3f}")
    if kl is not None and kl_predicted and all(probe["kl/sequence"] > FAR * kl_predicted for probe in probes):
        found.append(f"KL is {kl:.2f} nats, {kl / kl_predicted:.0f} times what p* takes")
    if entropies and entropies[-1] < NOTHING**2 * entropies[0]:
        found.append(f"entropy has fallen from {entropies[0]:.3g} to {entropies[-1]:.3g} nats a token")
    return ", and ".join(found) or None


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
    half, three_quarters = (int(np.searchsorted(pace[1:], share * pace[-1], side="right")) for share in (0.5, 0.75))
    quarters = [rewards[half:three_quarters], rewards[three_quarters:]]
    if min(map(len, quarters)) < BLOCKS or not np.isfinite(rewards).all():
        return None
    means = [np.array([block.mean() for block in np.array_split(quarter, BLOCKS)]) for quarter in quarters]
    change = float(means[1].mean() - means[0].mean())
    error = np.sqrt(sum(blocks.var(ddof=1) / BLOCKS for blocks in means))
    half_width = float(stdtrit(2 * BLOCKS - 2, (1 + confidence) / 2) * error)
    return {"mean": change, "low": change - half_width, "high": change + half_width}


def in_words(result: dict[str, Any]) -> str:
    """The sentence that goes with the word of `standing`, from the numbers of a result."""
    ledger, standing = result.get("ledger", {}), result["standing"]
    p_ref, p_final, rising = result["p_ref"]["mean"], result["p_final"]["mean"], result.get("trend")
    followed = f"the policy has followed {ledger['followed']['mean']:.2f} of the pull" if "followed" in ledger else ""
    parted = f"; {followed}" if followed else ""
    parted += _expected(result)
    moved = f"{rising['mean']:+.3f} from the third quarter of the run to the last" if rising else ""
    if standing == HOPELESS:
        counted = (
            "no completion"
            if p_ref == 0
            else "every completion"
            if p_ref == 1
            else "of each prompt all or no completions"
        )
        return f"nothing to learn: {counted} of the reference succeeded, and groups of equal rewards teach nothing"
    if standing == COLLAPSED:
        below = "objective" in ledger and ledger["objective"]["high"] < 0
        climbed = f" and the objective is at {ledger['objective']['mean']:+.3f}, below its start" if below else ""
        advice = (
            "lower optimizer.learning_rate, raise objective.beta, or look at the samples for what is rewarded instead"
        )
        return f"collapsed: success fell from {p_ref:.3f} to {p_final:.3f}{climbed}; {advice}"
    if standing == UNKNOWN:
        why = "too few samples tell push from hold: raise evaluate.final_samples"
        if "difference" not in result:
            why = "there is no prediction to compare with"
        elif "slope" not in ledger:
            why = "push and hold are known only where KL(π‖π_ref) decides the end"
            why = why if "kl" in ledger else "there are too few log-ratios, or they are not finite"
        return f"where it stands is not known: {why}"
    if standing == ARRIVED:
        return f"arrived: p̂ is where β takes it, within ±{result['difference']['half_width']:.4f}{_wasted(ledger)}"
    if standing == ABOVE:
        return (
            f"above p*: prompts that share parameters helped each other, or p_ref was measured too low{_wasted(ledger)}"
        )
    if standing == UNFINISHED:
        to_go = (result.get("speed") or {}).get("iterations_to_go")
        more = f": about {to_go:,.0f} iterations to go at the speed of this run" if to_go else ""
        is_pushed = "slope" in ledger and ledger["slope"]["low"] > 0
        why = (
            "the objective still rises on the way from the reference" if is_pushed else f"success still rises, {moved}"
        )
        return f"not arrived yet{more}{parted}, and {why}: more iterations or a larger learning rate take it further"
    if standing == NOISY:
        beyond, still = ledger["beyond_rest"], ""
        nats = f", with {beyond['mean']:.3f} nats of KL more than a rest point with this success spends" * (
            beyond["low"] > 0
        )
        below = ", below the start on its objective" * (ledger["objective"]["high"] < 0)
        if rising and rising["low"] > 0:
            still = f" Success still rises, {moved}."
        remedy = _averaged(result) or "A learning rate that decays, larger batches or train.average bring it back."
        return f"noise: the policy is beyond a rest point{nats}{below}. {remedy}{still} It is short of p*{parted}"
    still = f", and success moved by {moved}" if moved else ""
    return (
        f"limited by the network: push and hold are in balance{still}{parted}. More iterations like the last do not take it "
        "further; a larger model, or another learning rate, may"
    )


def _averaged(result: dict[str, Any]) -> str:
    """What an average has made of the noise; "" where there is none, or where it is no better than the last iterate."""
    average = result.get("average", {})
    ledger, last = average.get("ledger", {}), result["ledger"]
    if "objective" not in ledger or ledger["objective"]["mean"] <= last["objective"]["mean"]:
        return ""
    left = f"{ledger['beyond_rest']['mean']:.3f} of them left, and an objective of {ledger['objective']['mean']:+.3f}"
    return (
        f"The average of the last {average['iterations']:,} iterations has {left}: take it (--checkpoint=average), "
        f"p̂ = {average['p_final']['mean']:.3f}."
    )


def _expected(result: dict[str, Any]) -> str:
    """What was said of this network before training, for a policy below p*."""
    if "attainable" not in result:
        return ""
    return f"; p† = {result['attainable']['mean']:.3f} was expected of this network"


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

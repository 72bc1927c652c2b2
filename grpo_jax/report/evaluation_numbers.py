"""The numbers of an evaluation: pass@k, majority votes, greedy accuracy, each with an interval.

There are two questions, and each has its own interval. How good is the policy on *these* prompts? Then only the samples are
random. How good is it on prompts *like* these? Then the prompts are a random sample as well, and the interval is wider.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import betaincinv, stdtrit

from grpo_jax import theory
from grpo_jax.report.forecast import interval_dict, mean_with_interval
from grpo_jax.report.run_result import pass_at_k

# With fewer successes than this, the pooled counts bound the mean success more closely than the prompts' own intervals do.
FEW = 10


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to ``most``.

    >>> powers_of_two(12)
    [1, 2, 4, 8]
    """
    return [2**i for i in range(most.bit_length())]


def majority_at_k(answers: Sequence[str | None], rewards: Sequence[float], k: int) -> float:
    """Unbiased maj@k of one prompt: the mean over ⌊n/k⌋ disjoint blocks of k samples of the reward of the most common answer.

    Where several answers are equally common, their rewards are averaged, and so are those of samples that give the same answer
    and have different rewards. A sample without an answer does not vote; a block without a vote has reward 0.

    Args:
      answers: [n] canonical spelling of each sample's answer, or None.
      rewards: [n] of each sample.
      k: votes, at most n.

    Returns:
      The mean reward, in [0, 1].

    Raises:
      ValueError: k is not in 1..n.

    Source: arXiv 2203.11171, §2, with unweighted votes.

    >>> majority_at_k(["4", "4", "5", None], [1.0, 1.0, 0.0, 0.0], 4), majority_at_k(["4", "5"], [1.0, 0.0], 2)
    (1.0, 0.5)
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs at least {k} samples, got {len(answers)}")

    def vote(first: int) -> float:
        rewards_of = defaultdict(list)
        for answer, reward in zip(answers[first : first + k], rewards[first : first + k], strict=True):
            if answer is not None:
                rewards_of[answer].append(reward)
        most = max(map(len, rewards_of.values()), default=0)
        winners = [sum(votes) / most for votes in rewards_of.values() if len(votes) == most]
        return sum(winners) / len(winners) if winners else 0.0

    blocks = [vote(first) for first in range(0, len(answers) - k + 1, k)]
    return sum(blocks) / len(blocks)


def interval_over_prompts(values: np.ndarray, confidence: float, groups: float = 1.0) -> tuple[float, float, float]:
    """(mean, low, high) of a quantity in [0, 1] over prompts like these, from one unbiased estimate per prompt.

    Wilson's interval for the effective number of independent trials x̄(1 − x̄)/(s²/Q), with Student's t in place of z. The
    variance s² of the estimates contains both the spread of prompts and the noise of the samples. It has 2Q/(κ − 1) degrees of
    freedom, at most Q − 1, where κ is the kurtosis of the estimates: few, where a few prompts decide the variance. A prompt
    counts as at most n/k trials, the disjoint groups of k samples behind its estimate. Where all estimates are equal, the
    variance is unknown, and each prompt counts as one trial.

    Args:
      values: [Q] estimates.
      confidence: in (0, 1).
      groups: n/k of pass@k or maj@k from n samples.

    Source: N. Dean and M. Pagano, J. Survey Statistics and Methodology 3 (2015), 484 (Wilson with effective sample size).

    >>> [round(x, 3) for x in interval_over_prompts(np.array([0.0, 0.5, 0.25, 0.25]), 0.95, 4)]
    [0.25, 0.06, 0.633]
    """
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, 0.0, 1.0  # one prompt says nothing of others
    trials, freedom = float(count), count - 1.0
    if np.ptp(values) > 0:
        spread = float(values.var())
        trials = min(mean * (1 - mean) * (count - 1) / spread, groups * count)
        kurtosis = float(((values - mean) ** 4).mean()) / spread**2
        freedom = max(1.0, 2 * count / max(kurtosis - 1, 2 * count / freedom))
    return mean, *_wilson(mean, trials, float(stdtrit(freedom, (1 + confidence) / 2)))


def success_bound(successes: int, trials: int, confidence: float) -> float:
    """The upper confidence bound (one-sided) on the mean success probability of these prompts.

    Clopper and Pearson's bound of the pooled counts. It holds although the prompts differ: the sum of independent trials
    spreads most where their probabilities are equal (W. Hoeffding, Ann. Math. Stat. 27 (1956), 713).

    >>> round(success_bound(0, 1000, 0.95), 6)  # the rule of three
    0.002991
    """
    return 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, confidence))


def dead_share(successes: np.ndarray, trials: int, group_size: int) -> float:
    """The expected share of groups whose rewards are all equal, over prompts with ``successes`` [Q] of ``trials`` each.

    Unbiased where there are at least as many trials as a group has members; see `theory.dead_fraction_of_counts`.

    >>> dead_share(np.array([0, 1]), 2, 2)
    0.5
    """
    with jax.enable_x64(True):
        return float(theory.dead_fraction_of_counts(np.asarray(successes), trials, group_size).mean())


def summarise(rows: Sequence[dict[str, Any]], *, confidence: float, group_size: int) -> dict[str, Any]:
    """The numbers of an evaluation from its rows, one per prompt (see `evaluate`), as JSON."""
    successes, trials = np.array([row["successes"] for row in rows]), int(rows[0]["trials"])  # [Q]
    total, completions = int(successes.sum()), len(rows) * trials

    # Of these prompts: only the samples are random.
    success = mean_with_interval(successes, trials, confidence)
    if total < FEW:
        success["high"] = min(success["high"], success_bound(total, completions, (1 + confidence) / 2))

    # Of prompts like these: they are a random sample too.
    def over_prompts(values: Iterable[float], k: int) -> dict[str, float]:
        return interval_dict(*interval_over_prompts(np.array([*values], float), confidence, trials / k))

    ks = powers_of_two(trials)
    passes = {str(k): over_prompts(pass_at_k(successes, trials, k), k) for k in ks}
    majority = rows[0]["majority"] and {str(k): over_prompts((row["majority"][str(k)] for row in rows), k) for k in ks}
    greedy = float(np.mean([row["greedy"] for row in rows]))
    greedy_ends = _wilson(greedy, len(rows), float(stdtrit(np.inf, (1 + confidence) / 2)))

    verdicts: Counter[str] = sum((Counter(row["verdicts"]) for row in rows), Counter())
    return {
        "prompts": len(rows),
        "samples": trials,
        "confidence": confidence,
        "group_size": group_size,
        "successes": total,
        "success": success,
        "success_bound": success_bound(total, completions, confidence),
        "pass": passes,
        "majority": majority,
        "greedy": interval_dict(greedy, *greedy_ends),
        "kl": None if rows[0]["kl"] is None else _mean_and_half_width([row["kl"] for row in rows], confidence),
        "length": sum(row["tokens"] for row in rows) / completions,
        "truncated": sum(row["truncated"] for row in rows) / completions,
        "verdicts": dict(sorted(verdicts.items())),
        "disagreements": sum(row["disagreements"] for row in rows),
        "never": int((successes == 0).sum()),
        "always": int((successes == trials).sum()),
        "dead_groups": dead_share(successes, trials, group_size),
    }


def _wilson(mean: float, trials: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share that need not be a count; inside [0, 1], exactly 0 and 1 at the ends."""

    def low(p: float) -> float:
        # The lower end is a root of a quadratic. This form of it has no difference, which would cancel for few successes.
        return 2 * trials * p * p / (2 * trials * p + z * z + z * (4 * trials * p * (1 - p) + z * z) ** 0.5)

    return low(mean), 1 - low(1 - mean)


def _mean_and_half_width(values: Sequence[float], confidence: float) -> dict[str, float | None]:
    x, half_width = np.array(values), None
    if len(x) > 1:
        half_width = float(stdtrit(len(x) - 1, (1 + confidence) / 2) * x.std(ddof=1) / len(x) ** 0.5)
    return {"mean": float(x.mean()), "half_width": half_width}

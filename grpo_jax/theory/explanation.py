"""In words: what training at one β will do to one prompt, and why, with numbers computed for that prompt."""

import math

import jax
import jax.numpy as jnp

from grpo_jax.theory.dynamics import bernoulli_kl, kl_budget, log_odds_slope
from grpo_jax.theory.forward_kl import forward_kl_flip_limit, forward_kl_multiplier, forward_kl_orbit_end
from grpo_jax.theory.groups import dead_fraction
from grpo_jax.theory.limits import fixed_points, limit_point
from grpo_jax.theory.planning import SWING, check_arguments, end_point
from grpo_jax.theory.thresholds import bistable_window, flip_window
from grpo_jax.theory.weights import Group, Weights, log_odds, omega, omega_minus, omega_plus

PULLS = {"reverse": "KL(π‖π_ref)", "forward": "KL(π_ref‖π), as k3 in the loss", "none": "no KL term"}
NEVER_CORRECT = "No completion is ever correct, so no group has anything to reinforce: p stays 0 at every β."
ALWAYS_CORRECT = "Every completion is correct, so no group has anything to tell apart: p stays 1 at every β."


def explain(p_ref: float, *, beta: float, weights: Weights, kl: str = "reverse") -> str:
    """What GRPO at one β will do to a prompt that the reference policy solves with probability p_ref, in a few lines.

    Args:
      p_ref: success probability of the reference policy, in [0, 1].
      beta: weight of the KL term, > 0.
      weights: the normaliser.
      kl: what the gradient of the KL term descends: "reverse" KL(π‖π_ref), "forward" KL(π_ref‖π) (k3 in the loss), or
        "none".

    Returns:
      Lines of text.

    Raises:
      ValueError: names the argument that is out of range.

    Source: the functions of this room, which name theirs.

    >>> print(explain(0.2, beta=1.0, weights=Group(8)).splitlines()[2])
      end      Many small steps climb from 0.2 to p* = 0.6249 and stop.
    """
    if not 0 <= p_ref <= 1:
        raise ValueError(f"p_ref={p_ref!r} is not a probability")
    check_arguments(beta, kl)
    with jax.enable_x64(True):
        reference = float(log_odds(float(p_ref)))
        parts = {}
        if math.isinf(reference):
            parts["now"] = NEVER_CORRECT if p_ref == 0 else ALWAYS_CORRECT
        elif float(omega(reference, weights, logits=True)) < 0:
            raise ValueError(f"weights={weights} push away from success")
        else:
            parts["now"] = _weights(reference, beta, weights, kl)
            parts["end"] = _small_steps(reference, beta, weights, kl)
            parts["exact"] = _exact(reference, beta, weights, kl)
            if kl == "reverse":
                parts["β"] = _thresholds(reference, beta, weights)
            parts["cost"] = _cost(reference, beta, weights, kl)
            if kl != "none":
                less, more = (_p(_end(reference, beta * factor, weights, kl)) for factor in (0.5, 2.0))
                parts["change"] = f"Half the β gives p* = {less}, twice the β {more}."
                parts["other"] = _other_kl(reference, beta, weights, kl)
        head = f"p_ref = {_p(reference)}, β = {beta:.4g}, {PULLS[kl]}"
        return "\n".join([head, *(f"  {label:<8} {text}" for label, text in parts.items())])


def _weights(reference: float, beta: float, weights: Weights, kl: str) -> str:
    up, down, total = (float(f(reference, weights, logits=True)) for f in (omega_plus, omega_minus, omega))
    text = ""
    if isinstance(weights, Group):
        if weights.baseline == "none" and weights.scale != "std":  # groups of successes alone still push
            dead = math.exp(-weights.size * math.log1p(math.exp(reference)))
            fate = "fail throughout and teach nothing"
        else:
            dead = float(dead_fraction(reference, weights.size, logits=True))
            use = "are drawn again" if weights.dynamic_sampling else "teach nothing"
            fate = f"have equal rewards throughout and {use}"
        text = f"{_percent(dead)} of groups of {weights.size} {fate}. "
    text += f"On average a success is weighted {up:+.4g} and a failure {0 - down:+.4g}, together Ω = {total:.4g}."
    if kl == "reverse":
        text += f" One exactly solved iteration raises the log-odds by Ω/β = {total / beta:.4g}."
    return text


def _small_steps(reference: float, beta: float, weights: Weights, kl: str) -> str:
    if kl == "none":
        return "Nothing holds the policy: p climbs to 1, whatever β is."
    star = _end(reference, beta, weights, kl)
    text = f"Many small steps climb from {_p(reference)} to p* = {_p(star)} and stop."
    if kl == "forward":
        return f"{text} It is the only fixed point."
    higher = [
        f"{_p(point.logit)} ({_kind(point.multiplier)})"
        for point in fixed_points(reference, beta=beta, weights=weights, logits=True)
        if point.logit - star > 1e-6 * (1 + abs(star))
    ]
    if higher:
        text += f" Further fixed points lie above, which they do not reach: {' and '.join(higher)}."
    return text


def _kind(multiplier: float) -> str:
    return "unstable" if multiplier >= 1 else "oscillating" if multiplier <= -1 else "stable"


def _exact(reference: float, beta: float, weights: Weights, kl: str) -> str:
    """Where exactly solved iterations from the reference end, and how fast."""
    if kl == "none":
        return "One exactly solved iteration is enough for that."
    star = _end(reference, beta, weights, kl)
    if kl == "reverse":
        multiplier = float(log_odds_slope(jnp.asarray(star), weights)) / beta
    else:
        multiplier = float(forward_kl_multiplier(star, beta=beta, weights=weights, logits=True))
    low, high, kind = _exact_end(reference, beta, weights, kl)
    if kind != "fixed":
        between = f"between {_p(low)} and {_p(high)}"
        why = f"an error at p* is multiplied by {multiplier:.3g} each time"
        wander = "wander chaotically" if kind == "chaos" else "swing"
        return f"Iterations solved exactly do not converge: they {wander} {between}; {why}."
    if high - star > 1e-6 * (1 + abs(star)):
        return f"Iterations solved exactly jump past it from {_p(reference)} and end at {_p(high)}."
    how = "overshoot and shrink" if multiplier < 0 else "shrink"
    return f"Iterations solved exactly end there too; errors {how} to {_percent(abs(multiplier))} with each."


def _exact_end(reference: float, beta: float, weights: Weights, kl: str) -> tuple[float, float, str]:
    """Lowest and highest log-odds of the end of exact iterations, and its kind."""
    if kl == "reverse":
        limit = limit_point(reference, beta=beta, weights=weights, logits=True)
        points = limit.p if isinstance(limit.p, tuple) else (limit.p,)
        return min(points), max(points), limit.kind
    end = forward_kl_orbit_end(reference, beta=beta, weights=weights, logits=True)
    moving = float(jax.nn.sigmoid(end.high) - jax.nn.sigmoid(end.low)) > SWING
    kind = "chaos" if end.lyapunov > 0 else "cycle" if end.period > 1 else "fixed"
    return float(end.low), float(end.high), kind if moving else "fixed"


def _thresholds(reference: float, beta: float, weights: Weights) -> str:
    """Where the folds and the flips of the prompt are, and what the fold does to p*."""
    folds = bistable_window(reference, weights=weights, logits=True)
    flips = flip_window(reference, weights=weights, logits=True)
    text = "There is one fixed point at every β, so p* changes smoothly with β."
    if folds is not None:
        low, high = folds
        below, above = (_p(_end(reference, low * factor, weights, "reverse")) for factor in (1 - 1e-9, 1 + 1e-9))
        text = f"β is {beta / low:.4g} times {low:.4g}, a fold: p* is {above} just above it, {below} just below."
        if low < beta < high:
            until = "every larger β" if math.isinf(high) else f"β = {high:.4g}"
            text += f" Up to {until} there is a second stable end near 1."
    if flips is None:
        return f"{text} No β makes exact iterations oscillate on this prompt."
    low, high = flips
    return f"{text} For β from {low:.4g} to {high:.4g} its fixed point repels exact iterations, by overshooting."


def _cost(reference: float, beta: float, weights: Weights, kl: str) -> str:
    star = math.inf if kl == "none" else _end(reference, beta, weights, kl)
    spent = float(bernoulli_kl(star, reference, logits=True))
    most = float(kl_budget(reference, logits=True))
    return f"KL(π*‖π_ref) = {spent:.4g} nats per completion, of at most ln(1/p_ref) = {most:.4g} that this prompt can cost."


def _other_kl(reference: float, beta: float, weights: Weights, kl: str) -> str:
    if kl == "forward":
        end = _p(_end(reference, beta, weights, "reverse"))
        limit = forward_kl_flip_limit(weights)
        calm = limit is None or log_odds(limit) < reference
        text = f"KL(π‖π_ref) in the place of k3 would end at p* = {end}."
        return f"{text} No β makes exact iterations oscillate on this prompt." if calm else text
    end = _p(_end(reference, beta, weights, "forward"))
    return f"A k3 term (TRL, DeepSeek), whose gradient is that of KL(π_ref‖π), would end at p* = {end}."


def _end(reference: float, beta: float, weights: Weights, kl: str) -> float:
    return float(end_point(reference, beta, weights, kl))


def _p(logit: float) -> str:
    """A probability from its log-odds, with its distance from 1 where that is small.

    >>> _p(0.0), _p(20.0)
    ('0.5', '1 − 2.1e-09')
    """
    rest = float(jax.nn.sigmoid(-logit))
    if rest > 1e-3:
        return f"{float(jax.nn.sigmoid(logit)):.4g}"
    return f"1 − {rest:.2g}" if rest > 0 else "1"


def _percent(share: float) -> str:
    """A share in per cent that does not round to none or all.

    >>> _percent(0.5), _percent(0.999999), _percent(0.0)
    ('50 %', 'over 99.9 %', '0 %')
    """
    if 0 < share < 1e-3:
        return "under 0.1 %"
    return "over 99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"

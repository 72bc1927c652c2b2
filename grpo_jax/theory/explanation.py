"""In words: what training at one β will do to one prompt, and why. Every number is computed when it is said."""

import math

import jax
import jax.numpy as jnp

from grpo_jax.theory.dynamics import bernoulli_kl, kl_budget, log_odds_slope
from grpo_jax.theory.forward_kl import forward_kl_flip_limit, forward_kl_multiplier, forward_kl_orbit_end
from grpo_jax.theory.groups import dead_fraction
from grpo_jax.theory.limits import fixed_points, limit_point
from grpo_jax.theory.planning import KLS, SWING, end_point
from grpo_jax.theory.thresholds import bistable_window, flip_window
from grpo_jax.theory.weights import Group, Weights, log_odds, omega, omega_minus, omega_plus


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
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta!r} must be positive and finite")
    if kl not in KLS:
        raise ValueError(f"kl={kl!r} is not one of {', '.join(map(repr, KLS))}")
    with jax.enable_x64(True):
        reference = float(log_odds(float(p_ref)))
        head = f"p_ref = {_p(reference)}, β = {beta:.4g}, {_pull(kl)}"
        if math.isinf(reference):
            return "\n".join([head, _line("now", _nothing(p_ref))])
        if float(omega(reference, weights, logits=True)) < 0:
            raise ValueError(f"weights={weights} push away from success")
        lines = [("now", _weights(reference, beta, weights, kl))]
        lines += [("end", _small_steps(reference, beta, weights, kl)), ("exact", _exact(reference, beta, weights, kl))]
        if kl == "reverse":
            lines.append(("β", _thresholds(reference, beta, weights)))
        lines.append(("cost", _cost(reference, beta, weights, kl)))
        if kl != "none":
            lines += [
                ("change", _change(reference, beta, weights, kl)),
                ("other", _other(reference, beta, weights, kl)),
            ]
        return "\n".join([head, *(_line(*line) for line in lines)])


def _line(label: str, text: str) -> str:
    return f"  {label:<8} {text}"


def _pull(kl: str) -> str:
    return {"reverse": "KL(π‖π_ref)", "forward": "KL(π_ref‖π), as k3 in the loss", "none": "no KL term"}[kl]


def _nothing(p_ref: float) -> str:
    if p_ref == 0:
        return "No completion is ever correct, so no group has anything to reinforce: p stays 0 at every β."
    return "Every completion is correct, so no group has anything to tell apart: p stays 1 at every β."


def _weights(reference: float, beta: float, weights: Weights, kl: str) -> str:
    up, down, total = (float(f(reference, weights, logits=True)) for f in (omega_plus, omega_minus, omega))
    text = ""
    if isinstance(weights, Group):
        dead = float(dead_fraction(reference, weights.size, logits=True))
        idle = "are drawn again" if weights.dynamic_sampling else "teach nothing"
        if weights.baseline == "none" and weights.scale != "std":
            dead, idle = math.exp(-weights.size * math.log1p(math.exp(reference))), "fail throughout and teach nothing"
        else:
            idle = f"have equal rewards throughout and {idle}"
        text = f"{_percent(dead)} of groups of {weights.size} {idle}. "
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
    others = [point for point in fixed_points(reference, beta=beta, weights=weights, logits=True) if point.logit > star]
    others = [point for point in others if point.logit - star > 1e-6 * (1 + abs(star))]
    if others:
        listed = " and ".join(f"{_p(point.logit)} ({_kind(point.multiplier)})" for point in others)
        text += f" Further fixed points lie above, which they do not reach: {listed}."
    return text


def _kind(multiplier: float) -> str:
    return "unstable" if multiplier >= 1 else "oscillating" if multiplier <= -1 else "stable"


def _exact(reference: float, beta: float, weights: Weights, kl: str) -> str:
    """Where exactly solved iterations from the reference end, and how fast."""
    if kl == "none":
        return "One exactly solved iteration is enough for that."
    star = _end(reference, beta, weights, kl)
    multiplier = _multiplier(star, reference, beta, weights, kl)
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
        end = limit_point(reference, beta=beta, weights=weights, logits=True)
        points = end.p if isinstance(end.p, tuple) else (end.p,)
        return min(points), max(points), end.kind
    found = forward_kl_orbit_end(reference, beta=beta, weights=weights, logits=True)
    moving = float(jax.nn.sigmoid(found.high) - jax.nn.sigmoid(found.low)) > SWING
    kind = "chaos" if found.lyapunov > 0 else "cycle" if found.period > 1 else "fixed"
    return float(found.low), float(found.high), kind if moving else "fixed"


def _multiplier(star: float, reference: float, beta: float, weights: Weights, kl: str) -> float:
    """The factor by which one exact iteration multiplies a small error at a fixed point."""
    if kl == "reverse":
        return float(log_odds_slope(jnp.asarray(star), weights)) / beta
    return float(forward_kl_multiplier(star, beta=beta, weights=weights, logits=True))


def _thresholds(reference: float, beta: float, weights: Weights) -> str:
    folds = bistable_window(reference, weights=weights, logits=True)
    flips = flip_window(reference, weights=weights, logits=True)
    texts = []
    if folds is None:
        texts.append("There is one fixed point at every β, so p* changes smoothly with β.")
    else:
        low, high = folds
        above = _end(reference, low * (1 + 1e-9), weights, "reverse")
        below = _end(reference, low * (1 - 1e-9), weights, "reverse")
        texts.append(
            f"β is {beta / low:.4g} times {low:.4g}, a fold: p* is {_p(above)} just above it, {_p(below)} just below."
        )
        if low < beta < high:
            until = "every larger β" if math.isinf(high) else f"β = {high:.4g}"
            texts.append(f"Up to {until} there is a second stable end near 1.")
    if flips is None:
        texts.append("No β makes exact iterations oscillate on this prompt.")
    else:
        texts.append(
            f"For β from {flips[0]:.4g} to {flips[1]:.4g} its fixed point repels exact iterations, by overshooting."
        )
    return " ".join(texts)


def _cost(reference: float, beta: float, weights: Weights, kl: str) -> str:
    star = math.inf if kl == "none" else _end(reference, beta, weights, kl)
    spent = float(bernoulli_kl(star, reference, logits=True))
    most = float(kl_budget(reference, logits=True))
    return f"KL(π*‖π_ref) = {spent:.4g} nats per completion, of at most ln(1/p_ref) = {most:.4g} that this prompt can cost."


def _change(reference: float, beta: float, weights: Weights, kl: str) -> str:
    less, more = (_p(_end(reference, beta * factor, weights, kl)) for factor in (0.5, 2.0))
    return f"Half the β gives p* = {less}, twice the β {more}."


def _other(reference: float, beta: float, weights: Weights, kl: str) -> str:
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

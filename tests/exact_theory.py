"""The theory in mpmath with 40 digits, written from the mathematics and not from the library: targets of tests/theory.

Everything takes log-odds as mpf; p and 1 − p are both formed as sigmoids, so nothing cancels next to 0 and 1.
"""

from mpmath.ctx_mp import MPContext

from grpo_jax.theory import Group, MeanOnly, NoisyVerifier, Whitened, WhitenedStd

mp = MPContext()  # a context of its own: other tests change the precision of the global one
mp.dps = 40


def sigmoid(L):
    return 1 / (1 + mp.exp(-max(mp.mpf(L), mp.mpf(-(10**6)))))  # e^1e50 has too many digits


def log_sigmoid(L):
    return -mp.log1p(mp.exp(-mp.mpf(L)))


def logit(p):
    p = mp.mpf(p)
    return mp.log(p) - mp.log(1 - p)


def kl(a, b):
    """kl of coins with log-odds a and b."""
    a, b = mp.mpf(a), mp.mpf(b)
    p, q = sigmoid(a), sigmoid(-a)
    return p * (log_sigmoid(a) - log_sigmoid(b)) + q * (log_sigmoid(-a) - log_sigmoid(-b))


def advantages(size, k, weights):
    """(of a success, of a failure) in a group of k successes."""
    mean = mp.mpf(k) / size
    others = {
        "mean": (mean, mean),
        "leave_one_out": (mp.mpf(k - 1) / (size - 1), mp.mpf(k) / (size - 1)),
        "none": (mp.mpf(0), mp.mpf(0)),
    }[weights.baseline]
    if k in (0, size) and (weights.baseline != "none" or weights.scale == "std" or k == 0):
        return mp.mpf(0), mp.mpf(0)
    var = mp.mpf(k) * (size - k) / (size * (size - weights.ddof))
    epsilon = mp.mpf(weights.epsilon)
    std = mp.sqrt(var + epsilon) if weights.epsilon_in == "variance" else mp.sqrt(var) + epsilon
    divisor = {"std": std, "none": mp.mpf(1), "mean": mean}[weights.scale]
    return (1 - others[0]) / divisor, -others[1] / divisor


def omega(L, weights):
    """Ω: E[A | success] − E[A | failure], or for groups E[Σ A_i score_i]/G over ∇p."""
    L = mp.mpf(L)
    p, q = sigmoid(L), sigmoid(-L)
    if isinstance(weights, Whitened):
        return 1 / mp.sqrt(p * q + mp.mpf(weights.epsilon))
    if isinstance(weights, WhitenedStd):
        return 1 / (mp.sqrt(p * q) + mp.mpf(weights.epsilon))
    if isinstance(weights, MeanOnly):
        return mp.mpf(1)
    if isinstance(weights, NoisyVerifier):
        tpr, fpr = mp.mpf(weights.tpr), mp.mpf(weights.fpr)
        seen = mp.log((tpr * p + fpr * q) / ((1 - tpr) * p + (1 - fpr) * q))
        return (tpr - fpr) * omega(seen, weights.weights)
    assert isinstance(weights, Group)
    size, total, live = weights.size, mp.mpf(0), mp.mpf(0)
    for k in range(size + 1):
        if weights.dynamic_sampling and k in (0, size):
            continue
        chance = mp.binomial(size, k) * p**k * q ** (size - k)
        plus, minus = advantages(size, k, weights)
        total += chance * (k * plus / p - (size - k) * minus / q) / size
        live += chance
    return total / live


def omega_pair(L, weights):
    """(ω⁺, ω⁻) of weights whose advantages have mean zero."""
    total = omega(L, weights)
    return sigmoid(-L) * total, sigmoid(L) * total


def log_odds_slope(L, weights):
    """dΩ/dL, numerically with more digits."""
    return mp.diff(lambda x: omega(x, weights), mp.mpf(L))


def step(L, reference, beta, weights, alpha=1):
    """The log-odds after one exactly solved iteration."""
    return alpha * mp.mpf(reference) + (1 - mp.mpf(alpha)) * mp.mpf(L) + omega(L, weights) / mp.mpf(beta)


def root(f, low, high):
    """Of f between two log-odds that bracket it."""
    return mp.findroot(f, (mp.mpf(low), mp.mpf(high)), solver="anderson", tol=1e-70, maxsteps=400)


def fixed_point(reference, beta, weights, low, high):
    """The one between ``low`` and ``high``."""
    return root(lambda L: L - mp.mpf(reference) - omega(L, weights) / mp.mpf(beta), low, high)


def clipped_step(old, anchor, beta, weights, clip, clip_high):
    """The log-odds that are best in the clipped problem: of its kinks and stationary points, those of highest value."""
    plus, minus = omega_pair(old, weights)
    clip, clip_high, beta = mp.mpf(clip), mp.mpf(clip_high), mp.mpf(beta)
    p, q = sigmoid(old), sigmoid(-mp.mpf(old))

    def value(L):
        x, y = sigmoid(L), sigmoid(-L)
        return plus * min(x, (1 + clip_high) * p) - minus * max(y, (1 - clip) * q) - beta * kl(L, anchor)

    candidates = [anchor + pull / beta for pull in (plus + minus, plus, minus, mp.mpf(0))]
    for right, wrong in (((1 + clip_high) * p, q - clip_high * p), (p + clip * q, (1 - clip) * q)):
        if wrong > 0:
            candidates.append(mp.log(right / wrong))
    return max(candidates, key=value)

"""Old advantages: thresholds against roots by mpmath and numpy, the recursion on explicit policies and by plain gradients."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from grpo_jax.theory import (
    Group,
    Whitened,
    critical_delay,
    critical_refresh,
    fixed_points,
    flow_point,
    iterate,
    optimal_log_policy,
    stale_iterate,
    update_staleness,
)

pytestmark = pytest.mark.usefixtures("double")

P_REF, BETA, WHITE = 1e-3, 3.0, Whitened(1e-5)  # where exact iterations flip between .002 and .633


def multiplier():
    return fixed_points(P_REF, beta=BETA, weights=WHITE)[0].multiplier


def swing(path, share=0.25):
    """Of the log-odds over the last part."""
    tail = np.asarray(path)[-int(share * len(path)) :]
    return float(np.ptp(tail, axis=0).max())


@pytest.mark.parametrize("m", [-1.02, -1.323, -2.0, -10.0])
def test_the_critical_delay_is_where_the_rightmost_root_crosses(m):
    """λ + 1 = m e^{−λτ} has its rightmost root at W_0(m τ e^τ)/τ − 1."""

    def rightmost(tau):
        tau = mpmath.mpf(tau)
        return float((mpmath.lambertw(m * tau * mpmath.exp(tau)) / tau - 1).real)

    critical = float(critical_delay(m))
    assert critical == pytest.approx(float(mpmath.acos(1 / mpmath.mpf(m)) / mpmath.sqrt(m * m - 1)), rel=1e-12)
    assert rightmost(critical * 0.999) < 0 < rightmost(critical * 1.001)
    assert rightmost(critical * 5) > 0 and rightmost(critical * 50) > 0  # it does not come back
    assert float(critical_delay(m, step=1e-6)) == pytest.approx(critical, rel=2e-5)


@pytest.mark.parametrize("m", [-1.0, -0.99, -0.3, 0.5, 0.999])
def test_no_delay_destabilises_below_one(m):
    """Every τ: the rightmost root stays to the left, though ever less so; at m = −1 too."""
    assert float(critical_delay(m)) == math.inf == float(critical_refresh(m))
    for tau in (0.1, 1.0, 10.0, 100.0):
        root = mpmath.lambertw(mpmath.mpf(m) * tau * mpmath.exp(mpmath.mpf(tau))) / tau - 1
        assert root.real < 0


def test_above_a_fold_no_delay_is_needed():
    for m in (1.0, 1.5):
        assert float(critical_delay(m)) == 0 == float(critical_refresh(m))
        for tau in (0.1, 10.0):
            root = mpmath.lambertw(mpmath.mpf(m) * tau * mpmath.exp(mpmath.mpf(tau))) / tau - 1
            assert root.real > (0 if m > 1 else -1e-15)
    assert math.isnan(float(critical_delay(math.nan))) and math.isnan(float(critical_refresh(math.nan)))


def test_whole_updates_against_the_roots_of_the_recursion():
    """x_{n+1} = (1 − a) x_n + a m x_{n−s}: every root inside the circle exactly if a s is below the critical delay."""
    decided = 0
    for a in (0.05, 0.2, 0.5, 0.8, 1.0):
        for m in (-8.0, -3.0, -1.5, -1.2, -1.05, -0.99, 0.5, 1.01):
            critical = float(critical_delay(m, step=a))
            for s in range(40):
                polynomial = np.zeros(s + 2)
                polynomial[0] = 1
                polynomial[1] -= 1 - a
                polynomial[-1] -= a * m
                radius = np.abs(np.roots(polynomial)).max()
                if abs(radius - 1) > 1e-9:
                    decided += 1
                    assert (radius < 1) == (a * s < critical), (a, m, s)
    assert decided > 1500


def test_the_swing_sets_in_at_the_critical_delay():
    step = 0.1
    critical = float(critical_delay(multiplier(), step=step)) / step
    before, after = (
        stale_iterate(
            math.log(P_REF / (1 - P_REF)),
            jnp.full(int(2000 / step), int(critical * share)),
            beta=BETA,
            weights=WHITE,
            step=step,
            logits=True,
        )
        for share in (0.9, 1.1)
    )
    assert swing(before) < 1e-3 and swing(after) > 1


def test_how_far_it_swings():
    """At delays 0, 1, 3 and 10: not at all, not at all, and as far as the recursion with a third of the step says."""
    reference = math.log(P_REF / (1 - P_REF))

    def plain(delay, step, end):
        """Heun's rule in plain floats, whose error is of second order."""
        lag = round(delay / step)
        path = [reference] * (lag + 1)
        pull = [_pull(x) for x in path]
        for _ in range(round(end / step)):
            now, late, next_late = path[-1], pull[-1 - lag], pull[-lag] if lag else None
            slope = reference + late - now
            ahead = now + step * slope
            target = reference + (_pull(ahead) if next_late is None else next_late)
            path.append(now + step * (slope + target - ahead) / 2)
            pull.append(_pull(path[-1]))
        return path

    for delay, expected in ((0, 0.0), (1, 0.0), (3, 2.25), (10, 6.78)):
        exact = swing(plain(delay, 0.05, 400))
        assert exact == pytest.approx(expected, abs=0.02)
        ages = jnp.full(40_000, round(delay / 0.01))
        path = stale_iterate(reference, ages, beta=BETA, weights=WHITE, step=0.01, logits=True)
        assert swing(path) == pytest.approx(exact, abs=0.15)


def _pull(logit):
    q = 1 / (1 + math.exp(-logit))
    return 1 / (BETA * math.sqrt(q * (1 - q) + 1e-5))


@pytest.mark.parametrize("weights", [WHITE, Group(8, dynamic_sampling=True)], ids=repr)
@pytest.mark.parametrize("updates", [1, 12])
def test_a_refreshed_sampler_is_two_kl(weights, updates):
    """From refresh to refresh it is exactly two-KL with α = 1 − q at β/α, q = (1 − a)^N."""
    step, p_ref = 0.1, jnp.asarray([1e-3, 0.02, 0.4])
    alpha = 1 - (1 - step) ** updates
    ages = update_staleness(12 * updates, refresh=updates).updates
    path = stale_iterate(p_ref, ages, beta=BETA, weights=weights, step=step)[::updates]
    np.testing.assert_allclose(path, iterate(p_ref, 12, beta=BETA / alpha, weights=weights, alpha=alpha), rtol=1e-9)


def test_the_critical_refresh_is_where_the_two_kl_multiplier_is_minus_one():
    m = multiplier()
    period = float(critical_refresh(m))
    assert math.exp(-period) + (1 - math.exp(-period)) * m == pytest.approx(-1, rel=1e-12)
    step = 0.05
    critical = period / -math.log1p(-step)
    for updates, settles in ((int(critical * 0.95), True), (int(critical * 1.05) + 1, False)):
        ages = update_staleness(400 * updates, updates_per_batch=updates).updates
        path = stale_iterate(math.log(P_REF / (1 - P_REF)), ages, beta=BETA, weights=WHITE, step=step, logits=True)
        assert (swing(path) < 0.01) == settles
    assert (swing(path) > 0.5) and period < float(critical_delay(m))


def test_explicit_policies_follow_the_recursion():
    """Each update an exact two-KL iteration on explicit outcomes, with the advantages of an older policy."""
    rewards = jnp.asarray([1, 0, 0, 1, 0])
    log_ref = jax.nn.log_softmax(jnp.asarray([-3.0, 0.4, 1.0, -4.0, 0.2]))
    step, ages = 0.3, [0, 1, 2, 0, 4, 5]
    policies = [log_ref]
    for n, age in enumerate(ages):
        old = policies[max(n - age, 0)]
        policies.append(
            optimal_log_policy(
                log_ref,
                rewards,
                p_old=float(jnp.exp(old) @ rewards.astype(float)),
                beta=0.8 / step,
                weights=Whitened(1e-3),
                alpha=step,
                log_old=policies[-1],
            )
        )
    p = [float(jnp.exp(x) @ rewards.astype(float)) for x in policies]
    path = stale_iterate(p[0], jnp.asarray(ages), beta=0.8, weights=Whitened(1e-3), step=step)
    np.testing.assert_allclose(path, p, rtol=1e-11)
    assert max(p) - min(p) > 0.1


def test_plain_gradients_swing_from_the_same_delay_on():
    """Autodiff of E_α[(π/α) A] − β KL on a softmax: at the fixed point an update of size η goes 2 η β p*(1 − p*) of the way."""
    end = fixed_points(P_REF, beta=BETA, weights=WHITE)[0]
    rate = 0.05
    size = rate / (2 * BETA * end.p * (1 - end.p))
    log_ref = jnp.log(jnp.asarray([P_REF, 1 - P_REF]))

    def objective(logits, sampled):
        log_policy = jax.nn.log_softmax(logits)
        p = jnp.exp(sampled[0])
        scale = jnp.sqrt(p * (1 - p) + 1e-5)
        advantages = jnp.stack([1 - p, -p]) / scale
        reward = (jnp.exp(sampled) * jnp.exp(log_policy - sampled) * advantages).sum()
        return reward - BETA * (jnp.exp(log_policy) * (log_policy - log_ref)).sum()

    def run(lag):
        def step(queue, _):
            logits = queue[-1] + size * jax.grad(objective)(queue[-1], jax.nn.log_softmax(queue[0]))
            return jnp.concatenate([queue[1:], logits[None]]), logits[0] - logits[1]

        start = jnp.stack([log_ref] * (lag + 1)).at[-1].add(jnp.asarray([end.logit - 0.1 - jnp.diff(-log_ref)[0], 0.0]))
        return jax.lax.scan(step, start, None, length=12_000)[1]

    critical = float(critical_delay(end.multiplier, step=rate)) / rate
    assert swing(run(int(critical * 0.93))) < 0.02
    assert swing(run(int(critical * 1.07) + 1)) > 0.4


@pytest.mark.parametrize("weights", [Group(8), Whitened(0.1)], ids=repr)
def test_with_one_fixed_point_and_no_flip_every_delay_converges(weights):
    """p_ref above the cusp and the flip limit, whose exact iterations converge: so do all solutions with a delay."""
    rng = np.random.default_rng(3)
    p_ref, beta = jnp.asarray(rng.uniform(0.05, 0.95, 64)), jnp.asarray(10 ** rng.uniform(-0.7, 1.3, 64))
    for age in (0, 20, 200):
        path = stale_iterate(p_ref, jnp.full(6000, age), beta=beta, weights=weights, step=0.1)
        np.testing.assert_allclose(path[-1], flow_point(p_ref, beta=beta, weights=weights), atol=1e-8)
        assert swing(path, 0.1) < 1e-8


def test_a_whole_step_without_age_is_the_exact_iteration():
    p_ref = jnp.asarray([0.0, 1e-3, 0.3, 1.0])
    path = stale_iterate(p_ref, jnp.zeros(20, int), beta=BETA, weights=WHITE)
    np.testing.assert_allclose(path, iterate(p_ref, 20, beta=BETA, weights=WHITE), rtol=1e-13)
    assert path[:, 0].tolist() == [0.0] * 21 and path[:, 3].tolist() == [1.0] * 21
    # s updates old and exactly solved: s + 1 orbits that do not know of each other
    old = stale_iterate(p_ref, jnp.full(12, 2), beta=BETA, weights=WHITE)
    np.testing.assert_allclose(old[0:13:3], iterate(p_ref, 4, beta=BETA, weights=WHITE), rtol=1e-12)


def test_old_samples_jump_past_the_point_where_fresh_ones_stop():
    """Above the fold, and no fixed point flips: as long as the samples are those of the reference, L runs towards h(p_ref)."""
    ends = [
        float(stale_iterate(0.05, jnp.full(1500, age), beta=0.7, weights=WHITE, step=0.1)[-1]) for age in (0, 20, 40)
    ]
    stop = float(flow_point(0.05, beta=0.7, weights=WHITE))
    assert stop == pytest.approx(0.4788, abs=1e-4)
    assert ends == pytest.approx([stop, stop, 1.0], abs=1e-6)

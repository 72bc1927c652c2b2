"""The clipped form against its definition, and the clipped map against a maximum found without its case distinctions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import (
    Group,
    MeanOnly,
    NoisyVerifier,
    Whitened,
    WhitenedStd,
    clipped_success_map,
    contrastive_term,
    fixed_points,
    fold_beta,
    iterate,
    omega,
    omega_minus,
    omega_plus,
    success_map,
    success_map_slope,
)

WEIGHTS = [Whitened(1e-5), Whitened(1e-2), WhitenedStd(1e-4), MeanOnly(), Group(8), Group(4, baseline="none")]


def orbit(p_ref, num_iterations, *, p_0=None, **options):
    return np.asarray(_orbit(p_ref, p_ref if p_0 is None else p_0, num_iterations, options))


@partial(jax.jit, static_argnums=2)
def _orbit(p_ref, p_0, num_iterations, options):
    step = lambda p, _: (clipped_success_map(p, p_ref, **options), p)  # noqa: E731
    return jax.lax.scan(step, jnp.asarray(p_0), None, length=num_iterations)[1]


def test_reference_values_49_and_50(double):
    options = {"weights": Whitened(1e-5), "clip": 0.2}
    assert float(clipped_success_map(0.2, 0.2, beta=1.0, **options)) == pytest.approx(0.291871903464, abs=1e-12)
    assert float(clipped_success_map(0.2, 0.2, beta=0.2, **options)) == pytest.approx(0.36, abs=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=repr)
def test_the_clipped_map_is_the_maximum_of_the_clipped_objective(weights, double):
    """The concave objective of one number, maximised by ternary search in log-odds."""
    rng = np.random.default_rng(0)
    p, p_ref = jnp.asarray(rng.uniform(0.005, 0.995, (2, 400)))
    beta, alpha = jnp.asarray(np.exp(rng.uniform(-2.5, 2, 400))), jnp.asarray(rng.choice([0.0, 0.4, 1.0], 400))
    low, high = jnp.asarray(rng.uniform(0.05, 0.9, (2, 400)))
    anchor = alpha * jnp.log(p_ref / (1 - p_ref)) + (1 - alpha) * jnp.log(p / (1 - p))
    plus, minus = omega_plus(p, weights), omega_minus(p, weights)

    def objective(logit):
        x, y = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        gain = plus * jnp.minimum(x, (1 + high) * p) - minus * jnp.maximum(y, (1 - low) * (1 - p))
        to_right = jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(anchor)
        return gain - beta * (x * to_right + y * (jax.nn.log_sigmoid(-logit) - jax.nn.log_sigmoid(-anchor)))

    left, right = jnp.full(400, -40.0), jnp.full(400, 700.0)
    for _ in range(300):
        a, b = left + (right - left) / 3, right - (right - left) / 3
        rising = objective(a) < objective(b)
        left, right = jnp.where(rising, a, left), jnp.where(rising, right, b)
    mapped = clipped_success_map(p, p_ref, beta=beta, weights=weights, clip=low, clip_high=high, alpha=alpha)
    # A search by values resolves a smooth maximum to the root of the precision.
    np.testing.assert_allclose(mapped, jax.nn.sigmoid((left + right) / 2), atol=3e-7)
    best = objective(jnp.log(mapped) - jnp.log1p(-mapped))
    assert bool((best >= jnp.maximum(objective(left), objective(right)) - 1e-12 * (1 + jnp.abs(best))).all())


def test_without_a_kink_in_reach_it_is_the_success_map(double):
    p = jnp.linspace(0.02, 0.98, 49)
    for alpha in (0.0, 0.5, 1.0):
        options = {"beta": 60.0, "weights": Whitened(1e-3), "alpha": alpha}
        np.testing.assert_allclose(
            clipped_success_map(p, p, clip=0.9, **options), success_map(p, p, **options), rtol=1e-13
        )


@pytest.mark.parametrize("p_ref", [0.05, 0.2, 0.5])
def test_clipping_keeps_fixed_points_and_multipliers(p_ref, double):
    weights, beta = Whitened(1e-5), 1.6
    points = fixed_points(p_ref, beta=beta, weights=weights)
    assert len(points) == 3

    def mapped(p):
        return clipped_success_map(p, p_ref, beta=beta, weights=weights, clip=0.2)

    for point in points[:2]:
        assert float(mapped(point.p)) == pytest.approx(point.p, rel=1e-12)
        assert float(jax.grad(mapped)(point.p)) == pytest.approx(point.multiplier, rel=1e-9)
        assert float(success_map_slope(point.p, p_ref, beta=beta, weights=weights)) == pytest.approx(point.multiplier)


def test_a_clipped_orbit_stops_where_an_unclipped_one_jumps(double):
    weights, beta, p_ref = Whitened(1e-5), 0.45, 0.01
    low, middle, high = fixed_points(p_ref, beta=beta, weights=weights)
    assert float(iterate(p_ref, 200, beta=beta, weights=weights)[-1]) == pytest.approx(high.p)
    clipped = orbit(p_ref, 200, beta=beta, weights=weights, clip=0.2)
    assert clipped.max() < middle.p and clipped[-1] == pytest.approx(low.p, rel=1e-9)


def test_the_bound_on_the_width_that_forbids_jumps_holds_and_is_needed(double):
    """c_high ≤ (2p_m − 1)/(1 − p_m): never past p_m, over 4,000 random cases; beyond it, a case that passes."""
    rng = np.random.default_rng(1)
    weights, tried = Whitened(1e-6), 0
    for p_ref in np.exp(rng.uniform(np.log(1e-9), np.log(0.4), 40)):
        for beta in np.exp(rng.uniform(-2, 1.5, 6)):
            points = fixed_points(float(p_ref), beta=float(beta), weights=weights)
            if len(points) < 3:
                continue
            middle = points[1].p
            starts = jnp.asarray(rng.uniform(p_ref, middle * (1 - 1e-9), 50))
            widths = {"clip": rng.uniform(0.05, 1), "clip_high": (2 * middle - 1) / (1 - middle)}
            paths = orbit(jnp.full(50, p_ref), 60, p_0=starts, beta=beta, weights=weights, **widths)
            assert (paths < middle * (1 + 1e-12)).all()
            tried += 50
    assert tried > 4000
    beta = 1.0005 * fold_beta(1e-12, weights=Whitened(1e-5))
    _, middle, high = fixed_points(1e-12, beta=beta, weights=Whitened(1e-5))
    assert (2 * middle.p - 1) / (1 - middle.p) < 0.5
    assert orbit(1e-12, 400, beta=beta, weights=Whitened(1e-5), clip=0.5)[-1] == pytest.approx(high.p)


def test_saw_teeth_instead_of_cycles_and_chaos(double):
    for p_ref, beta, low, high in ((1e-4, 5.0, 0.0027, 0.00368), (1e-3, 3.0, 0.0132, 0.0168)):
        tail = orbit(p_ref, 2000, beta=beta, weights=Whitened(1e-5), clip=0.2)[-500:]
        assert tail.min() == pytest.approx(low, abs=2e-5) and tail.max() == pytest.approx(high, abs=2e-5)


def test_without_a_kl_the_climb_is_the_wrong_kink(double):
    climbing = orbit(1e-30, 4, p_0=1e-12, beta=1e-12, weights=Whitened(1e-5), clip=0.2)
    np.testing.assert_allclose(climbing, [0, 0.2, 0.36, 0.488], atol=1e-9)


def test_the_contrastive_term_is_the_clipped_surrogate(double):
    rng = np.random.default_rng(2)
    ratio, p_old = jnp.asarray(np.exp(rng.normal(0, 0.5, 500))), jnp.asarray(rng.uniform(0.02, 0.98, 500))
    rewards = jnp.asarray(rng.integers(0, 2, 500))
    for weights in (Whitened(1e-3), MeanOnly(), Group(8, 1)):
        advantage = jnp.where(rewards == 1, omega_plus(p_old, weights), -omega_minus(p_old, weights))
        clipped = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - 0.2, 1 + 0.28) * advantage)
        term = contrastive_term(ratio, rewards, p_old, weights=weights, clip=0.2, clip_high=0.28)
        np.testing.assert_allclose(term, clipped, rtol=1e-13)
        unclipped = contrastive_term(ratio, rewards, p_old, weights=weights)
        np.testing.assert_allclose(unclipped, ratio * advantage, rtol=1e-13)


def test_where_the_contrastive_term_is_constant():
    def slope(ratio, reward):
        return float(jax.grad(lambda r: contrastive_term(r, reward, 0.3, weights=Whitened(), clip=0.2))(ratio))

    assert slope(1.21, 1) == 0 == slope(0.79, 0)
    plus, minus = (float(f(0.3, Whitened())) for f in (omega_plus, omega_minus))
    assert [slope(r, 1) for r in (0.1, 0.79, 1.19)] == pytest.approx([plus] * 3)
    assert [slope(r, 0) for r in (0.81, 1.21, 5.0)] == pytest.approx([-minus] * 3)


def test_the_unclipped_mean_is_the_gain_in_success(double):
    rng = np.random.default_rng(3)
    old, new = jnp.asarray(rng.dirichlet(np.ones(9), 2))
    rewards = jnp.asarray([1, 1, 1, 0, 0, 0, 0, 0, 0])
    p_old, p_new = (jnp.where(rewards == 1, x, 0.0).sum() for x in (old, new))
    mean = (old * contrastive_term(new / old, rewards, p_old, weights=Whitened(1e-3))).sum()
    assert float(mean) == pytest.approx(float(omega(p_old, Whitened(1e-3)) * (p_new - p_old)), rel=1e-12)


def test_ends_types_and_transformations():
    options = {"beta": 1.0, "weights": Whitened(1e-4), "clip": 0.2}
    ends = clipped_success_map(jnp.float32([0.3, 0.3]), jnp.float32([0.0, 1.0]), **options)
    assert ends.tolist() == [0.0, 1.0] and ends.dtype == jnp.float32
    slopes = jax.vmap(jax.grad(lambda p: clipped_success_map(0.3, p, **options)))(jnp.array([0.0, 0.2, 1.0]))
    assert np.isfinite(slopes).all()
    logit = float(clipped_success_map(80.0, 80.0, logits=True, **options))
    assert logit > 80
    betas = jnp.array([0.2, 1.0])
    batched = jax.jit(jax.vmap(lambda b: clipped_success_map(0.2, 0.2, beta=b, weights=Whitened(1e-5), clip=0.2)))(
        betas
    )
    np.testing.assert_allclose(batched, [0.36, 0.2918719], rtol=1e-5)


def test_noisy_verifiers_are_refused():
    noisy = NoisyVerifier(Whitened(), 0.9, 0.1)
    with pytest.raises(ValueError, match="NoisyVerifier"):
        clipped_success_map(0.3, 0.2, beta=1.0, weights=noisy, clip=0.2)
    with pytest.raises(ValueError, match="NoisyVerifier"):
        contrastive_term(1.0, 1, 0.2, weights=noisy, clip=0.2)
    assert float(contrastive_term(1.0, 1, 0.2, weights=noisy)) > 0

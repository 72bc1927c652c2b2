"""What the docs prove about networks, on enumerated policies: the objective, its split, its rest points and their limits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import networks
from experiments.networks import (
    WEIGHTS,
    Toy,
    climb,
    gradient,
    ledger,
    make_network,
    make_toy,
    regression,
    rest,
    state_of,
)
from grpo_jax.theory import flow_point, omega

SMALL = {"prompts": 3, "outcomes": 12, "rank": 4, "signal": 1.0}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def objective(toy, theta, beta, form):
    """J = Σ_i ∫Ω dp − β KL_i, written out; the integral by the trapezoidal rule."""
    log, log_ref = (networks.log_policy(toy, x, form) for x in (theta, toy.start))
    p, p_ref = ((jnp.exp(x) * toy.rewards).sum(-1) for x in (log, log_ref))
    grid = p_ref[:, None] + (p - p_ref)[:, None] * jnp.linspace(0.0, 1.0, 2001)[None, :]
    return (jnp.trapezoid(omega(grid, WEIGHTS), grid) - beta * (jnp.exp(log) * (log - log_ref)).sum(-1)).sum()


def test_the_gradient_is_that_of_the_objective_and_the_split_is_the_enumerated_one():
    network, layers = make_network(0, prompts=3, outcomes=12, hidden=2)
    for toy, form in ((make_toy(0, **SMALL), networks.linear), (network, layers)):
        theta = toy.start + 0.3 * jax.random.normal(jax.random.key(0), toy.start.shape, float)
        value, slope = jax.value_and_grad(objective, argnums=1)(toy, theta, 0.7, form)
        np.testing.assert_allclose(gradient(toy, theta, 0.7, WEIGHTS, form), slope, atol=2e-6)
        state, first = state_of(toy, theta, form), state_of(toy, toy.start, form)
        spent = ledger(toy, state, first.logit, 0.7, WEIGHTS)
        assert float(spent.objective) == pytest.approx(float(value) / 3, abs=1e-6)
        # The conditional KLs one prompt and one class at a time.
        policy, reference = np.asarray(state.policy), np.asarray(first.policy)
        within = {1.0: 0.0, 0.0: 0.0}
        for pi, ref, r in zip(policy, reference, np.asarray(toy.rewards), strict=True):
            for kind in within:
                x, y = pi[r == kind], ref[r == kind]
                within[kind] += (x * np.log(x / x.sum() / (y / y.sum()))).sum() / 3
        assert float(spent.within_successes) == pytest.approx(within[1.0], rel=1e-9)
        assert float(spent.within_failures) == pytest.approx(within[0.0], rel=1e-9)
        assert float(spent.kl) == pytest.approx((policy * np.log(policy / reference)).sum() / 3, rel=1e-9)


def test_small_steps_climb_it_to_the_rest_point_and_the_ray_says_so():
    toy = make_toy(1, **SMALL)
    theta, path = climb(toy, 1.0, WEIGHTS, rate=0.01, steps=4000)
    assert (jnp.diff(path.objective) > -1e-13).all() and path.objective[-1] > 0.02
    np.testing.assert_allclose(theta, rest(toy, 1.0, WEIGHTS)[0], atol=1e-5)
    left = (path.gain - path.price)[1:] / path.gain[1:]
    assert left[0] > 0.9 and (left > -1e-9).all() and left[-1] < 1e-6
    # dJ/ds is the slope of J along the ray.
    middle = climb(toy, 1.0, WEIGHTS, rate=0.01, steps=100)[0]
    slope = jax.grad(lambda s: objective(toy, s * middle, 1.0, networks.linear))(1.0) / 3
    assert float(path.gain[100] - path.price[100]) == pytest.approx(float(slope), abs=1e-6)


def test_one_prompt_at_rest_obeys_the_exact_identities():
    toy = make_toy(3, prompts=1, outcomes=30, rank=5, signal=1.0)
    theta, _ = rest(toy, 0.6, WEIGHTS)
    (pi,), (ell,), (reached,) = state_of(toy, theta)
    (reference,), (r,) = state_of(toy, toy.start).logit, toy.rewards
    p, pull = jax.nn.sigmoid(reached), omega(reached, WEIGHTS, logits=True) / 0.6
    # R² of the reward on the features under the policy at rest, by weighted least squares.
    root = np.sqrt(pi)[:, None]
    design = np.concatenate([np.ones((30, 1)), toy.inputs[0]], axis=1)
    fit = design @ np.linalg.lstsq(root * design, root[:, 0] * r, rcond=None)[0]
    v = p * (1 - p)
    r2 = float(pi @ (fit - p) ** 2 / v)
    np.testing.assert_allclose(ell - pi @ ell, pull * (fit - p), atol=1e-5)
    assert float(pi @ ell**2 - (pi @ ell) ** 2) == pytest.approx(float(pull**2 * r2 * v), rel=1e-5)
    spent = ledger(toy, state_of(toy, theta), reference[None], 0.6, WEIGHTS)
    apart = spent.within_successes / p - spent.within_failures / (1 - p)
    assert float(reached - reference) == pytest.approx(float(pull * r2 - apart), rel=1e-5)
    assert abs(apart) > 0.01


def test_a_prompt_that_is_pulled_the_wrong_way_falls_and_their_sum_does_not():
    """One feature, up with success on the first prompt, down on the second: the second falls although its Ω is positive."""
    rewards = jnp.asarray([[1.0, 0.0], [1.0, 0.0]])
    toy = Toy(
        jnp.asarray([[-1.0, 0.0], [0.0, 0.0]]), rewards, jnp.asarray([[[3.0], [0.0]], [[-1.0], [0.0]]]), jnp.zeros(1)
    )
    found, first = regression(toy, WEIGHTS), state_of(toy, toy.start)
    assert found.shares[0] > 0 > found.shares[1]
    state = state_of(toy, rest(toy, 1.0, WEIGHTS)[0])
    assert state.logit[0] > first.logit[0] and state.logit[1] < first.logit[1] - 0.05
    assert (flow_point(first.logit, beta=1.0, weights=WEIGHTS, logits=True) > first.logit).all()
    spent = ledger(toy, state, first.logit, 1.0, WEIGHTS)
    assert spent.potential > spent.kl > 0  # J ≥ 0: the potentials together cannot fall
    lowest = []
    for seed in range(5):
        toy = make_toy(seed, prompts=6, outcomes=15, rank=9, signal=0.0)
        logit, found = state_of(toy, toy.start).logit, regression(toy, WEIGHTS)
        pull, v = omega(logit, WEIGHTS, logits=True), networks.variance(logit)
        assert 0 <= pull**2 * v @ found.shares == pytest.approx(float(pull @ found.coupling @ pull))
        assert 0 < found.r2 < 1
        lowest.append(float(found.shares.min()))
    assert min(lowest) < 0


def test_a_network_can_rest_above_the_table():
    """A feature that cannot tell successes apart: what failures spend within goes away with the failures."""
    features = jnp.asarray([[[1.0], [1.0], [0.9], [-1.0]]])
    toy = Toy(jnp.log(jnp.asarray([[0.2, 0.2, 0.1, 0.5]])), jnp.asarray([[1.0, 1.0, 0.0, 0.0]]), features, jnp.zeros(1))
    start = state_of(toy, toy.start).logit
    above = [
        float(
            state_of(toy, rest(toy, beta, WEIGHTS)[0]).logit[0]
            - flow_point(start, beta=beta, weights=WEIGHTS, logits=True)[0]
        )
        for beta in (0.3, 5.0)
    ]
    assert above[1] < 0 < above[0]


def test_noise_pushes_beyond_rest_by_half_the_rate_times_the_squared_gradient():
    toy = make_toy(1, **SMALL)
    spent, squares = networks.sampled_climb(toy, 1.0, rate=0.1, steps=20_000, seed=0)
    slope, law = float((spent.gain - spent.price)[2000:].mean()), -0.1 / 2 * float(squares[2000:].mean()) / 3
    assert slope == pytest.approx(law, rel=0.1) and slope < -0.01


def test_the_figures_and_the_tables_are_written(tmp_path, capsys):
    networks.experiment(tmp_path, quick=True)
    numbers = json.loads((tmp_path / "rank.json").read_text(encoding="utf-8"))
    (cases,) = numbers.values()
    assert len(cases) == 2 * len(networks.BETAS)
    assert all(case["left"] < 1e-6 for case in cases)
    weak = [case for case in cases if case["beta"] == 3.0]
    assert max(case["rms"]["together"] for case in weak) < 0.01 < min(case["rms"]["table"] for case in weak)
    assert "| rank | β | R² |" in capsys.readouterr().out
    for name in ("climbs", "rank"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000

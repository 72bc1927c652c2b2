"""The live forecast: its flow against an integrator and against the fixed points, its intervals on simulated runs, its edges."""

import json

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from grpo_jax import theory
from grpo_jax.objective import DAPO, GRPO, GRPO_TRL, MIRROR_GRPO, Objective
from grpo_jax.report import live_forecast as live

ITERATIONS, TRIALS = 60, 256


def course(objective=GRPO, *, beta=1.0, successes=None, visits=None, prompts=40, peak=1.0, trials=TRIALS):
    if successes is None:
        successes = np.random.default_rng(0).binomial(trials, np.linspace(0.1, 0.7, 40))
    return live.make_course(
        np.asarray(successes),
        trials,
        objective=objective,
        beta=beta,
        group_size=8,
        pace=peak * np.arange(ITERATIONS + 1.0),
        visits=np.tile(np.arange(len(successes)), (ITERATIONS, 1)) if visits is None else visits,
        prompts_per_iteration=prompts,
        samples=16,
        final_samples=256,
    )


def simulated(course, number, *, kappa, rho, exponent=0.0, noise=0.0):
    """Rows of a run that obeys the model, and the mean at its end."""
    generator, rows, shift = np.random.default_rng(number), [], 0.0
    keep = np.exp(-kappa * max(course.flow.beta, 0.3))
    prompts = [course.measured[None]] * 2
    if (course.batches != course.measured).any():
        prompts[1] = np.concatenate([course.batches, course.measured[None]])
    at = np.array([rho]), np.array([exponent]), kappa * course.pace[None]
    of_all, of_batch = (
        live._at(live._mean_over(course.flow, shares), *at) for shares in prompts
    )  # [1, n + 1] twice each

    def measured(n, completions):
        m, v = (x[0, n] for x in (of_batch if completions == course.completions else of_all))
        return float(np.clip(m + v * shift + np.sqrt(v / completions) * generator.normal(), 0, 1))

    for n in range(ITERATIONS):
        rows.append({"phase": "train", "iteration": n + 1, "reward/mean": measured(n, course.completions)})
        shift = keep * shift + noise * np.sqrt(1 - keep**2) * generator.normal()
        if (n + 1) % 10 == 0 and n + 1 < ITERATIONS:
            rows.append({"phase": "probe", "iteration": n + 1, "success/mean": measured(n + 1, course.probe)})
    return rows, measured(ITERATIONS, course.final)


@pytest.mark.parametrize(("kl", "beta"), [("reverse", 0.5), ("forward", 1.0), ("none", 1.0)])
def test_the_flow_is_that_of_an_integrator(kl, beta):
    weights = theory.Group(8, epsilon=1e-4)
    flow = live.make_flow(weights, beta=beta, kl=kl)
    fine = np.linspace(-40, 40, 4001)
    with jax.enable_x64(True):
        pull = np.asarray(theory.omega(fine, weights, logits=True))
    for r, a, n in ((30, 0, 28), (22, 1, 20), (34, 3, 36), (10, 2, 40)):
        start = live.NODES[n]
        p_ref = 1 / (1 + np.exp(-start))

        def rate(_, logit, rho=live.RHOS[r], a=live.EXPONENTS[a], start=start, p_ref=p_ref):
            p = 1 / (1 + np.exp(-logit))
            v = p * (1 - p)
            back = beta * (logit - start) if kl == "reverse" else beta * (p - p_ref) / v if kl == "forward" else 0.0
            return (4 * v) ** a * (rho * np.interp(logit, fine, pull) - back)

        options = {"method": "LSODA", "rtol": 1e-7, "atol": 1e-9}
        found = solve_ivp(rate, (0, live.TIMES[-1]), [start], t_eval=live.TIMES, **options)
        wanted = 1 / (1 + np.exp(-found.y[0]))
        np.testing.assert_allclose(flow.moments[r, a, :, n, 0], wanted, atol=2e-3)
    np.testing.assert_allclose(flow.moments[..., 1], flow.moments[..., 0] * (1 - flow.moments[..., 0]))


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_with_all_of_the_pull_the_flow_ends_at_the_fixed_point(kl):
    weights = theory.Group(8, epsilon=1e-4)
    flow = live.make_flow(weights, beta=1.0, kl=kl)
    solve = theory.flow_point if kl == "reverse" else theory.forward_kl_fixed_point
    with jax.enable_x64(True):
        star = solve(live.NODES, beta=1.0, weights=weights, logits=True)
        star = np.asarray(jax.nn.sigmoid(star))
    (place,) = np.flatnonzero(np.isclose(live.RHOS, 1.0))
    np.testing.assert_allclose(flow.moments[place, 0, -1, :, 0], star, atol=1e-4)


def test_intervals_hold_what_the_prior_draws():
    """Unknowns drawn from the prior, runs simulated with them: a 95 % interval holds the end, ρ and κ about 95 times of 100."""
    here, number = course(), 40
    u = np.random.default_rng(1).normal(size=(number, 5))
    kappa, rho, exponent, noise, _ = live._unknowns(u, fixed_rho=False, exponent=None)
    inside = {"end": 0, "rho": 0, "kappa": 0}
    for i in range(number):
        truth = {"kappa": kappa[i], "rho": rho[i]}
        rows, end = simulated(here, i, **truth, exponent=exponent[i], noise=noise[i])
        found = live._summary(here, live.fit(here, [r for r in rows if r["iteration"] <= 20]), 0.95)
        for name, value in (truth | {"end": end}).items():
            inside[name] += found[name]["low"] <= value <= found[name]["high"]
    assert all(count >= 0.85 * number for count in inside.values()), inside


@pytest.mark.parametrize(("rho", "is_said"), [(1.0, False), (0.5, True)])
def test_a_pull_that_does_not_get_through_is_found_and_said_once(rho, is_said):
    here = course(beta=0.7)
    rows, end = simulated(here, 3, kappa=0.3, rho=rho, noise=0.02)
    history, said = [], []
    for row in rows:
        if row["phase"] == "probe":
            row = row | live.probe_metrics(here, [*history, row], 0.95)
        history.append(row)
        said += [row["iteration"]] if row["phase"] == "probe" and live.warning(history) else []
    last = [row for row in history if row["phase"] == "probe"][-1]
    assert last["forecast/rho_low"] < rho < last["forecast/rho_high"]
    assert last["forecast/low"] < end < last["forecast/high"]
    assert len(said) == is_said


def test_a_forecast_knows_nothing_of_the_future_and_repeats_itself():
    here = course()
    rows, end = simulated(here, 5, kappa=0.1, rho=1.0, noise=0.05)
    rows.append({"phase": "probe", "iteration": ITERATIONS, "success/mean": end})
    found = live.record(here, rows, 0.95)
    assert [forecast["iteration"] for forecast in found["forecasts"]] == [6, 18, 30]
    changed = [row if row["iteration"] <= 30 else row | {"reward/mean": 0.0, "success/mean": 0.0} for row in rows]
    assert live.record(here, changed, 0.95)["forecasts"] == found["forecasts"]
    assert json.loads(json.dumps(found)) == found
    # The path begins where it was made, ends in the forecast of the end, and its interval is around its mean.
    for forecast in found["forecasts"]:
        path = {name: np.array(values) for name, values in forecast["path"].items()}
        assert (path["iteration"][0], path["iteration"][-1]) == (forecast["iteration"], ITERATIONS)
        assert (path["low"] < path["mean"]).all() and (path["mean"] < path["high"]).all()
        assert path["mean"][-1] == pytest.approx(forecast["end"]["mean"], abs=1e-9)
    # The later forecast is the sharper one.
    widths = [forecast["end"]["high"] - forecast["end"]["low"] for forecast in found["forecasts"]]
    assert widths[0] > widths[1] > widths[2]


def test_the_speed_and_what_is_left():
    """Mean-only: all log-odds approach their ends at the rate κβ, so 95 % of the gain takes 3/(κβ) iterations."""
    here = course(Objective(scale="none"), beta=2.0)
    rows, end = simulated(here, 7, kappa=0.1, rho=1.0)
    speed = live.record(here, [*rows, {"phase": "probe", "iteration": 60, "success/mean": end}], 0.95)["speed"]
    assert speed["kappa"]["low"] < 0.1 < speed["kappa"]["high"]
    assert speed["iterations_to_go"] is None
    one = np.ones(1)
    known = live.Posterior(60, 0.02 * one, one, 0 * one, one, one, one, one)
    assert live._iterations_to_go(here, known) == pytest.approx(3 / (0.02 * 2) - 60, abs=5)
    unknown = known._replace(kappa=np.array([1e-3, 0.02, 0.4]), rho=np.ones(3), exponent=np.zeros(3))
    assert live._iterations_to_go(here, unknown) is None


@pytest.mark.parametrize("objective", [DAPO, MIRROR_GRPO])
def test_without_a_kl_to_the_reference_there_is_a_forecast_and_no_rho(objective):
    here = course(objective, beta=0.0)
    rows, end = simulated(here, 8, kappa=0.05, rho=1.0)
    found = live.record(here, rows, 0.95)
    for forecast in found["forecasts"]:
        assert forecast["rho"] is None
        assert forecast["end"]["low"] < end < forecast["end"]["high"]
    assert found["speed"]["rho"] is None
    row = live.probe_metrics(here, rows, 0.95)
    assert "forecast/rho" not in row
    assert live.warning([row | {"phase": "probe"}] * 2) is None


def test_the_forward_kl_has_its_own_end():
    here = course(GRPO_TRL, beta=1.0)
    rows, end = simulated(here, 9, kappa=0.2, rho=1.0)
    found = live.probe_metrics(here, rows, 0.95)
    assert found["forecast/low"] < end < found["forecast/high"]


def test_time_goes_forward_whatever_the_schedule():
    """Blocks of rewards and the probes among them are in one order, by iterations and by what they are worth."""
    fades = (1 + np.cos(np.pi * np.arange(600) / 600)) / 2
    here = course()._replace(pace=np.concatenate([[0.0], np.cumsum(fades)]))
    here = here._replace(batches=np.broadcast_to(here.measured, (600, len(here.measured))))
    rows = [{"phase": "train", "iteration": n + 1, "reward/mean": 0.7} for n in range(600)]
    rows += [{"phase": "probe", "iteration": n, "success/mean": 0.7} for n in range(0, 600, 7)]
    seen = live._observations(here, rows)
    assert (np.diff(seen.time, axis=0) >= 0).all()
    assert seen.completions.sum() == 600 * here.completions + 85 * here.probe
    assert np.isfinite(live.fit(here, rows).kappa).all()


def test_prompts_that_are_a_sample_of_the_measured_ones_widen_the_interval():
    """Iterations of 4 prompts: rewards say less of the mean where nobody knows which four they were."""
    many = np.random.default_rng(2).binomial(TRIALS, np.linspace(0.02, 0.98, 40))
    few = np.stack([np.random.default_rng(n).permutation(40)[:4] for n in range(ITERATIONS)])
    known = course(successes=many, visits=few, prompts=4)
    assert known.spread == 0
    np.testing.assert_allclose(known.batches.sum(-1), 1)
    sampled = known._replace(batches=np.broadcast_to(known.measured, known.batches.shape), spread=0.25)
    rows = simulated(known, 10, kappa=0.1, rho=1.0)[0]
    widths = [np.diff([*live.probe_metrics(c, rows, 0.95).values()][1:3])[0] for c in (known, sampled)]
    assert widths[1] > 1.05 * widths[0]


@pytest.mark.parametrize(
    ("successes", "objective", "bonus", "wanted"),
    [
        ([0, 0], GRPO, 0.0, "no completion of the reference succeeded"),
        ([8, 8], GRPO, 0.0, "every completion of the reference succeeded"),
        ([1, 4], GRPO, 0.1, "entropy bonus"),
        ([1, 4], Objective(scale="batch_std"), 0.0, "couples the prompts"),
        ([0, 4], GRPO, 0.0, None),
        ([1, 4], DAPO, 0.0, None),
    ],
)
def test_where_there_is_no_forecast_a_line_says_why(successes, objective, bonus, wanted):
    found = live.refusal(np.array(successes), 8, objective=objective, entropy_bonus=bonus)
    assert found is wanted if wanted is None else wanted in found and "\n" not in found


def test_a_thousand_prompts_most_of_them_never_solved():
    """Their posteriors, not their counts, enter: a prompt with no success in 8 may still move."""
    p_ref = np.random.default_rng(3).beta(0.3, 3.0, 1000)
    counts = np.random.default_rng(4).binomial(8, p_ref)
    here = course(successes=counts, trials=8, visits=np.tile(np.arange(40), (ITERATIONS, 1)))
    assert abs(here.flow.moments[0, 0, 0, :, 0] @ here.measured - counts.mean() / 8) < 0.005
    assert here.error == pytest.approx(np.std(p_ref - counts / 8) / np.sqrt(1000), rel=0.3)
    rows, _ = simulated(here, 11, kappa=0.1, rho=1.0)
    assert 0 < live.probe_metrics(here, rows[:5], 0.95)["forecast/low"] < 1

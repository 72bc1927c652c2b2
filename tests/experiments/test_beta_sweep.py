"""The flow that says which runs have arrived: it ends where the theory's fixed points are, at the optimizer's pace."""

from dataclasses import replace

import numpy as np
import optax
import pytest

from experiments import beta_sweep
from grpo_jax import theory
from grpo_jax.config import ConfigError
from grpo_jax.objective import GRPO
from grpo_jax.report.sweep_figure import p_star_curve
from tests.tiny_run import tiny_config

P_REF = np.array([0.1, 0.4, 0.7])


@pytest.mark.parametrize("kl", list(beta_sweep.OBJECTIVES))
@pytest.mark.parametrize("beta", [0.7, 3.0])
def test_the_flow_ends_at_the_fixed_point(kl, beta):
    objective = replace(GRPO, kl=kl)
    (wanted,) = p_star_curve(P_REF, np.array([beta]), objective=objective, group_size=8)
    options = {"beta": beta, "weights": theory.Group(8), "forward": objective.kl_direction == "forward"}
    path = beta_sweep.flow(P_REF, np.full((4000, 2), [0.5, 1e-3]), **options)
    assert path[0] == pytest.approx([P_REF.mean()] * 2)
    assert path[-1, 0] == pytest.approx(wanted, abs=1e-3)
    assert P_REF.mean() < path[-1, 1] < wanted - 0.01  # too slow to have arrived


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_pace_is_the_optimizers(schedule):
    config = tiny_config(optimizer__schedule=schedule, optimizer__warmup_updates=5, train__iterations=40)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, 35),
        "linear": optax.linear_schedule(1.0, 0.0, 35),
        "constant": optax.constant_schedule(1.0),
    }[schedule]
    wanted = optax.join_schedules([optax.linear_schedule(0.0, 1.0, 5), after], [5])
    rates = beta_sweep.learning_rates(config)
    np.testing.assert_allclose(rates, [float(wanted(n)) for n in range(40)], atol=1e-6)


def test_an_iteration_of_several_updates_has_their_mean_pace():
    config = tiny_config(
        optimizer__schedule="linear", optimizer__warmup_updates=4, train__iterations=5, train__minibatches=2
    )
    wanted = [0.125, 0.625, 1 - 0.5 / 6, 1 - 2.5 / 6, 1 - 4.5 / 6]
    np.testing.assert_allclose(beta_sweep.learning_rates(config), wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"objective__entropy_bonus": 0.01}, "entropy_bonus=0.01"), ({"objective__kl": "none"}, "objective.kl='none'")],
)
def test_what_the_theory_does_not_predict_is_refused(changes, words):
    config = tiny_config(**changes)
    with pytest.raises(ConfigError, match=words):
        beta_sweep.check_predicted(config, replace(GRPO, kl=config.objective.kl or GRPO.kl))


def test_only_small_beta_has_not_arrived():
    """Rewards that follow the flow at a known pace: the pace is found, and the run that is too short for its β is named."""
    config = tiny_config(optimizer__schedule="constant", optimizer__warmup_updates=0, train__iterations=300)
    betas, weights, results, rewards = (0.2, 3.0), theory.Group(8), [], []
    for beta in betas:
        rewards.append(beta_sweep.flow(P_REF, np.full((300, 1), 0.1), beta=beta, weights=weights, forward=False)[:, 0])
        (star,) = p_star_curve(P_REF, np.array([beta]), objective=GRPO, group_size=8)
        results.append({"beta": beta, "prompts": {"p_ref": P_REF}, "p_star": {"mean": star}})
        results[-1]["difference"] = {"half_width": 0.005}
    arrived = beta_sweep.arrivals(config, results, np.array(rewards).T[:, None], objective=GRPO, group_size=8)
    assert arrived == [False, True]


def test_a_device_per_core_keeps_the_flags_that_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--one=1")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    variables = beta_sweep.device_per_core()
    assert variables["XLA_FLAGS"].split() == ["--xla_cpu_multi_thread_eigen=false", "--one=1"]
    assert int(variables["JAX_NUM_CPU_DEVICES"]) >= 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    assert beta_sweep.device_per_core() == {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true",
        "JAX_NUM_CPU_DEVICES": "3",
    }

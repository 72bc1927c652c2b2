"""β chosen by where a run is to end, a mean success probability or a KL from the reference, once both have been measured."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.objective import Objective
from grpo_jax.report.forecast import make_attainable, make_forecast
from grpo_jax.runs.directory import BETA, load, save
from grpo_jax.runs.run import Run, say
from grpo_jax.theory import beta_where


def has_target(config: Any) -> bool:
    """Whether β is to be chosen."""
    return config.objective.target_success is not None or config.objective.target_kl is not None


def with_chosen_beta(run: Run, before: dict[str, Any], measured: dict[str, Any]) -> Run:
    """The run at the β that its target asks for, which is stored in the run directory.

    Args:
      run: see `Run`.
      before: the measurement of the reference.
      measured: what `grpo_jax.runs.attainable` found.

    Raises:
      ConfigError: no β leads there, and what is in reach.
    """
    chosen = load(run.directory / BETA)
    if chosen is None:
        chosen = save(run.directory / BETA, choose_beta(run.config, run.setup.recipe.objective, before, measured))
    say(run.console, f"{chosen['target']}: β = {chosen['beta']:g}, at which {chosen['words']}")
    return run._replace(config=at_chosen_beta(run.config, run.directory))


def at_chosen_beta(config: Any, directory: Path) -> Any:
    """The config with the β that was chosen for the run in a directory; as it is where none was."""
    chosen = load(directory / BETA)
    if chosen is None:
        return config
    config = config.copy_and_resolve_references()
    config.objective.beta = chosen["beta"]
    return config


def choose_beta(config: Any, objective: Objective, before: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """{"beta": to four digits, "target": the key that asks for it, "words": what is expected there}.

    A success is that of the network, p†, where R² was measured, else p*. R² is a bound from below, and so success may end above
    the target, by up to p* − p†. A KL is that of p*: a network that follows less of the pull spends less.
    """
    successes, trials = np.array(before["successes"]), before["trials"]
    setting: dict[str, Any] = {"objective": objective, "group_size": config.rollout.group_size}
    setting |= {"confidence": config.evaluate.confidence}

    def of_table(beta: float) -> Any:
        forecast = make_forecast(successes, trials, beta=beta, **setting)
        assert forecast is not None  # the config's check
        return forecast

    def of_network(beta: float) -> Any:
        return make_attainable(successes, trials, measured, beta=beta, **setting)

    key = "target_success" if config.objective.target_kl is None else "target_kl"
    target = config.objective[key]
    if key == "target_kl":
        label, at = "the predicted KL, in nats,", lambda beta: float(of_table(beta).mean_kl)
    elif of_network(1.0) is not None:
        label, at = "p† of this network", lambda beta: float(of_network(beta).mean)
    else:
        label, at = "p* (R² of the network was not measured)", lambda beta: float(of_table(beta).mean_p_star)
    try:
        exact = beta_where(at, target)
    except ValueError as error:
        raise ConfigError([f"objective.{key}={target:g} is out of reach: {label} is {error}"]) from None
    beta = float(f"{exact.beta:.4g}")
    words = f"{label} is {at(beta):.4g}"
    if exact.jumps_to is not None:
        words += f"; a fold jumps over the target, just below this β to {exact.jumps_to:.4g}"
    if label.startswith("p†"):
        words += f" at least, and p* {float(of_table(beta).mean_p_star):.4g}: success ends between them"
    assert math.isfinite(beta)
    return {"beta": beta, "target": f"objective.{key}={target:g}", "words": words}

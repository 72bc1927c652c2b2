"""β chosen by a target: what is expected there is the target, a later start keeps it, and what no β reaches is refused."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.objective import GRPO
from grpo_jax.report.forecast import make_attainable, make_forecast
from grpo_jax.runs.evaluation import evaluate
from grpo_jax.runs.loop import train
from grpo_jax.runs.target import choose_beta
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")

BEFORE = {"successes": [10, 30, 50, 2], "trials": 100}
MEASURED = {"r2": {"mean": 0.6, "low": 0.5, "high": 0.7}, "shares": [0.6] * 4, "needed": None}
SETTING = {"objective": GRPO, "group_size": 8, "confidence": 0.95}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def chosen(measured, **target):
    config = tiny_config(rollout__group_size=8, **{f"objective__{key}": value for key, value in target.items()})
    return choose_beta(config, GRPO, BEFORE, measured)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_what_is_expected_at_the_chosen_beta_is_the_target(target):
    counts = np.array(BEFORE["successes"]), BEFORE["trials"]
    of_network = chosen(MEASURED, target_success=target)
    there = make_attainable(*counts, MEASURED, beta=of_network["beta"], **SETTING)
    assert there.mean == pytest.approx(target, abs=1e-3)
    assert (
        "p† of this network is" in of_network["words"] and of_network["target"] == f"objective.target_success={target}"
    )
    of_table = chosen({"reason": "left out"}, target_success=target)
    assert make_forecast(*counts, beta=of_table["beta"], **SETTING).mean_p_star == pytest.approx(target, abs=1e-3)
    assert of_table["beta"] > of_network["beta"]  # a network that follows less of the pull wants a lower β
    of_kl = chosen(MEASURED, target_kl=target)
    assert make_forecast(*counts, beta=of_kl["beta"], **SETTING).mean_kl == pytest.approx(target, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"target_success": 0.1}, "target_success=0.1 is out of reach: p† of this network is 0.2.* at least"),
        ({"target_kl": 50.0}, "target_kl=50 is out of reach: .* at most"),
    ],
)
def test_what_no_beta_reaches_is_refused(target, words):
    with pytest.raises(ConfigError, match=words):
        chosen(MEASURED, **target)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_success": 1.0}, r"must be inside \(0, 1\)"),
        ({"target_kl": 0.0}, "must be positive"),
        ({"target_success": 0.5, "target_kl": 0.5}, "choose one"),
        ({"target_success": 0.5, "entropy_bonus": 0.1}, "predicts nothing of this objective"),
        ({"target_success": 0.5, "name": "DAPO", "beta": 0.0}, "predicts nothing of this objective"),
    ],
)
def test_targets_that_mean_nothing_are_refused_at_the_start(changes, words):
    with pytest.raises(ConfigError, match=words):
        validate(tiny_config(**{f"objective__{key}": value for key, value in changes.items()}), num_devices=8)


def test_a_run_with_a_target_is_the_run_at_its_beta(tmp_path):
    """The same bits as a run that is given that β; a later start and an evaluation read it."""
    changes = {"train__iterations": 3, "warm_start__target": 0.1, "attainable__samples": 96, "attainable__steps": 2}
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    config = tiny_config(**changes, objective__target_kl=0.2)
    result = train(config, tmp_path / "a", console)
    beta = json.loads((tmp_path / "a" / "beta.json").read_text())["beta"]
    assert result["beta"] == beta != 1.0 and result["kl_predicted"] == pytest.approx(0.2, rel=1e-3)
    said = " ".join(console.export_text().split())
    assert "will be chosen for objective.target_kl=0.2" in said
    assert f"objective.target_kl=0.2: β = {beta:g}, at which" in said
    given = train(tiny_config(**changes, objective__beta=beta), tmp_path / "b", Console(quiet=True))
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert {**given, "files": None} == {**result, "files": None}

    (tmp_path / "a" / "result.json").unlink()
    assert train(config, tmp_path / "a", Console(quiet=True)) == result
    by_target = evaluate(config, tmp_path / "a", Console(quiet=True))
    by_beta = evaluate(tiny_config(**changes, objective__beta=beta), tmp_path / "b", Console(quiet=True))
    assert by_target["ledger"] == by_beta["ledger"]  # whose objective has β in it

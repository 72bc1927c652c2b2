"""Metrics files, pass@k, the verdict on the prediction, and the page."""

import itertools
import json

import numpy as np
import pytest

from grpo_jax.objective import DAPO, GRPO, GRPO_TRL
from grpo_jax.report import forecast, run_page, run_result
from grpo_jax.report.metrics_log import MetricsLog, read_metrics
from grpo_jax.report.run_figure import plot_run
from tests.tiny_run import tiny_config


def rows(directory):
    return [(r["iteration"], r["phase"]) for r in read_metrics(directory / "metrics.jsonl")]


def test_a_resumed_log_drops_what_will_be_computed_again(tmp_path):
    log = MetricsLog(tmp_path, after=None)
    for n in range(1, 5):
        log.write({"iteration": n, "phase": "train", "loss/total": 0.1 * n})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "pha')  # torn by a kill
    assert rows(tmp_path) == [(n, "train") for n in range(1, 5)]
    log = MetricsLog(tmp_path, after=2)
    log.write({"iteration": 3, "phase": "train"})
    log.close()
    assert rows(tmp_path) == [(1, "train"), (2, "train"), (3, "train")]
    MetricsLog(tmp_path, after=None).close()
    assert rows(tmp_path) == []


def test_numbers_survive_the_file_exactly(tmp_path):
    value = float(np.float32(0.1) / 3)
    log = MetricsLog(tmp_path, after=None)
    log.write({"iteration": 1, "phase": "train", "loss/total": value})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss/total"] == value


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iter\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_average_over_all_subsets(k):
    for successes in range(6):
        outcomes = [1] * successes + [0] * (5 - successes)
        exact = np.mean([max(subset) for subset in itertools.combinations(outcomes, k)])
        np.testing.assert_allclose(run_result.pass_at_k(np.array([successes]), 5, k)[0], exact)
    with pytest.raises(ValueError, match="pass@6 needs at least 6"):
        run_result.pass_at_k(np.array([1]), 5, 6)


def counts(successes, trials=1000, **more):
    return {
        "successes": list(successes),
        "trials": trials,
        "greedy": 0.5,
        "kl": 0.3,
        "length": 2.0,
        "truncated": 0.0,
        "verdicts": {},
        "examples": [{"prompt": "1+1=", "target": "2", "completions": [{"text": "2\x1b[31m`", "reward": 1.0}]}],
    } | more


def outcome(objective, shift):
    """A result whose final success probability is the prediction plus a shift."""
    config = tiny_config()
    before = counts([200, 500, 350])
    shape = {"objective": objective, "group_size": 4, "beta": 1.0}
    prediction = forecast.make_forecast(np.array(before["successes"]), 1000, confidence=0.95, **shape)
    final = (
        [700, 800, 750] if prediction is None else np.round((np.asarray(prediction.p_star) + shift) * 1000).astype(int)
    )
    return run_result.make_result(config, before, counts([int(x) for x in final]), prediction), prediction


def test_the_verdict_says_inside_only_inside():
    inside, prediction = outcome(GRPO, 0.0)
    assert inside["difference"]["inside"]
    assert inside["p_star"]["mean"] == pytest.approx(float(np.mean(prediction.p_star)), abs=1e-6)
    for shift in (-0.06, 0.06):
        outside, _ = outcome(GRPO, shift)
        assert not outside["difference"]["inside"]
        assert outside["difference"]["mean"] == pytest.approx(shift, abs=1e-3)
        assert "OUTSIDE" in dict(run_page.result_lines(outside))["p̂ − p*"]
    # The interval is that of both measurements: about 1.96 √(2 · p(1−p)/3000), a little wider for the slope of p*(p_ref).
    assert 0.015 < inside["difference"]["half_width"] < 0.05


def test_the_objective_decides_what_is_predicted():
    paper, _ = outcome(GRPO, 0.0)
    k3, _ = outcome(GRPO_TRL, 0.0)
    assert abs(k3["p_star"]["mean"] - paper["p_star"]["mean"]) > 0.03
    none, prediction = outcome(DAPO, 0.0)
    assert prediction is None
    assert "p_star" not in none
    assert "no prediction" in dict(run_page.result_lines(none))["KL(π‖π_ref), nats"]


def test_the_page_shows_model_output_as_inert_text(tmp_path):
    result, _ = outcome(GRPO, 0.0)
    page = run_page.page(
        result, [("task", "sums")], {"before": counts([1])["examples"], "after": counts([1])["examples"]}
    )
    assert "\x1b" not in page
    assert r"\x1b[31mˋ" in page
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("objective", [GRPO, DAPO])
def test_the_figure_is_drawn_with_and_without_a_prediction(tmp_path, objective):
    result, prediction = outcome(objective, 0.0)
    probes = [forecast.probe_row(n, counts([300, 400, 500]), 0.95) for n in (0, 5, 10)]
    iterates = None
    if prediction is not None:
        iterates = forecast.exact_iterates(
            np.asarray(prediction.p_ref), 10, objective=objective, group_size=4, beta=1.0
        )
        assert iterates[0] == pytest.approx(0.35)
        assert iterates[-1] == pytest.approx(result["p_star"]["mean"], abs=1e-3)
    path = {"iteration": [1, 10], "mean": [0.4, 0.6], "low": [0.3, 0.5], "high": [0.5, 0.7]}
    result["forecasts"] = [{"iteration": 1, "path": path}] * 3
    plot_run(tmp_path / "figure.png", rows=probes, result=result, iterates=iterates)
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_the_header_says_what_the_settings_say_of_noise():
    config = tiny_config(optimizer__schedule="constant", train__minibatches=2, train__average=0.25)
    words = "16 completions an update; the rate stays at 0.001, and the run keeps its noise to the end; "
    assert run_page.noise_words(config) == f"{words}the last 25% of the iterations are averaged beside"
    words = "32 completions an update; cosine from 0.001 to 0, where it dies out"
    assert run_page.noise_words(tiny_config()) == words

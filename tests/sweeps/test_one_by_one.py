"""A sweep of runs: what it means, that points are checked before any runs, and that it goes on where it stopped."""

import json
import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.command import with_value
from grpo_jax.config import ConfigError
from grpo_jax.files import write_json, write_sealed
from grpo_jax.objective import GRPO, GRPO_TRL
from grpo_jax.report import forecast, run_result
from grpo_jax.report.sweep_figure import p_star_curve
from grpo_jax.runs.directory import open_run_directory
from grpo_jax.runs.errors import Diverged, Preempted, RunDirectoryError, StartedInVain
from grpo_jax.sweeps import one_by_one
from grpo_jax.sweeps.one_by_one import list_points, run_points
from grpo_jax.sweeps.points import folder_name, make_points, parse_grid
from tests.tiny_run import tiny_config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The theory's programs are kept from one sweep to the next."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(one_by_one, "CURVE", 15)


def points_of(text, **changes):
    return make_points(tiny_config(**changes), parse_grid(text), with_value)


def console(tmp_path):
    return Console(file=(tmp_path / "said.txt").open("a"), width=200)


def said(tmp_path):
    return (tmp_path / "said.txt").read_text()


class Runs:
    """Stands for `train`: a run directory as it leaves it, a result by the theory; or what ``ends`` says of (β, seed)."""

    def __init__(self, points, ends=()):
        self.points, self.ends, self.begun = {id(point.config): point for point in points}, dict(ends), []

    def __call__(self, config, workdir, console):
        point = self.points[id(config)]
        at = (config.objective.beta, config.seed)
        self.begun.append(at)
        with open_run_directory(workdir, point.identity) as directory:
            (directory / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
            if at in self.ends:
                raise self.ends[at]
            trials = config.evaluate.final_samples
            successes = np.random.default_rng(config.seed).binomial(trials, 0.4, 16)
            shape = {
                "objective": point.objective,
                "group_size": config.rollout.group_size,
                "beta": config.objective.beta,
            }
            prediction = forecast.make_forecast(successes, trials, confidence=0.95, **shape)
            rest = {"trials": trials, "greedy": 0.5, "kl": 0.1, "length": 2.0, "truncated": 0.0, "verdicts": {}}
            ended = np.round(prediction.p_star * trials).astype(int)
            result = run_result.make_result(
                config, {"successes": successes} | rest, {"successes": ended} | rest, prediction
            )
            write_sealed(directory / "result.json", result)


def test_semicolons_part_keys_and_commas_values_outside_brackets():
    text = r"a.b=0.1, 1 ;c=(1,2),(3,);d=('x;\',(',),[']'];"
    assert parse_grid(text) == {"a.b": ["0.1", "1"], "c": ["(1,2)", "(3,)"], "d": [r"('x;\',(',)", "[']']"]}
    for wrong in ("", " ; ", "a", "=1", "a=", "a=1,,2", "a=1;a=2", "a=(1", "a=1)", "a=('"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_grid(wrong)


def test_values_are_what_the_flags_make_of_them_and_the_last_key_is_fastest():
    points = points_of(
        "objective.beta=1,2e-1; model.stop_ids=(1,2),(2,); objective.scale=none,std", objective__beta=3.0
    )
    assert len(points) == 8
    values = [tuple(point.values.values()) for point in points]
    assert values[:3] == [(1.0, (1, 2), "none"), (1.0, (1, 2), "std"), (1.0, (2,), "none")]
    assert [type(x) for x in values[0]] == [float, tuple, str]
    config = points[-1].config
    assert (config.objective.beta, config.model.stop_ids, config.objective.scale) == (0.2, (2,), "std")
    assert config.is_locked and config.seed == 0


def test_no_two_points_share_a_directory_and_names_are_safe():
    assert folder_name({"objective.beta": 0.3, "seed": 0}) == "objective.beta=0.3,seed=0"
    odd = ["a/b", "a-b", "a:b", "../..", "x" * 300, "x" * 301, "é", "\x00", ""]
    names = [folder_name({"model.path": value}) for value in odd]
    names += [folder_name({"a": value}) for value in (0.1, 0.1 + 2**-56, 1e-7, 1, True, (1,), (1, 2))]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) and len(name) < 200


def test_mistakes_are_found_before_anything_is_made(tmp_path):
    for text, message in (
        ("objective.betaa=1", "unknown config key betaa. Did you mean beta"),
        ("seed=1.5", r"--config\.seed=1\.5"),
        ("seed=0,1,00", "seed has the value 0 twice"),
        ("objective={'beta': 1.0}", "objective is a group"),
        ("seed.x=1", r"seed\.x"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            points_of(text)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        points_of("objective.beta=-1,1; rollout.group_size=1,4; seed=0,1", train__iterations=0)
    text = str(error.value)
    assert "sweep of 8 points cannot run" in text
    assert "train.iterations=0 must be at least 1 (all points)" in text
    beta = next(line for line in text.splitlines() if "objective.beta=-1.0" in line)
    assert "(4 of 8 points: objective.beta=-1, rollout.group_size=1, seed=0; " in beta and beta.endswith("and 1 more)")
    assert text.count("rollout.group_size=1 must be") == 1


def test_a_sweep_runs_every_point_once_and_leaves_a_record_a_page_and_a_figure(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1; seed=0,1"), tmp_path / "sweep"
    runs = Runs(points)
    states = run_points(points, workdir, console(tmp_path), run=runs)
    assert runs.begun == [(0.3, 0), (0.3, 1), (1.0, 0), (1.0, 1)]
    assert {state.name for state in states} == {"done"}
    record = json.loads((workdir / "sweep.json").read_text())["points"]
    assert [row["folder"] for row in record][:2] == ["objective.beta=0.3,seed=0", "objective.beta=0.3,seed=1"]
    result = json.loads((workdir / record[3]["folder"] / "result.json").read_text())
    assert (record[3]["p_star"], record[3]["difference"]) == (result["p_star"], result["difference"])
    page = (workdir / "sweep.md").read_text()
    assert page.count("| arrived |") == 4 and "(figure.png)" in page and f"{result['p_final']['mean']:.3f}" in page
    assert (workdir / "figure.png").read_bytes().startswith(b"\x89PNG")
    out = said(tmp_path)
    assert "point 3 of 4: objective.beta=1, seed=0\n" in out and "p†" in out
    again = Runs(points)
    run_points(points, workdir, console(tmp_path), run=again)
    assert again.begun == []
    assert "point 4 of 4: objective.beta=1, seed=1: done, p̂ 0." in said(tmp_path)
    more = points_of("objective.beta=0.3,1; seed=0,1,2")  # a larger grid goes on from the smaller one's points
    again = Runs(more)
    run_points(more, workdir, console(tmp_path), run=again)
    assert again.begun == [(0.3, 2), (1.0, 2)]


def test_a_failed_point_says_why_and_is_tried_again_last(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1,2"), tmp_path / "sweep"
    why = "the loss | was \x1b[31mnan[/bold]"
    states = run_points(points, workdir, console(tmp_path), run=Runs(points, {(0.3, 0): Diverged(why)}))
    assert [state.name for state in states] == ["failed", "done", "done"]
    assert states[0].why == why
    for text in ((workdir / "sweep.md").read_text(), said(tmp_path)):
        assert r"was \x1b[31mnan[/bold]" in text and "\x1b" not in text
    (workdir / "objective.beta=1" / "result.json").unlink()
    again = Runs(points)
    states = run_points(points, workdir, console(tmp_path), run=again)
    assert again.begun == [(1.0, 0), (0.3, 0)]
    assert {state.name for state in states} == {"done"}
    assert "failed" not in (workdir / "sweep.md").read_text()


def test_points_that_fail_at_every_start_are_said_to(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1"), tmp_path / "sweep"
    vain = {(0.3, 0): StartedInVain("3 starts in a row"), (1.0, 0): Diverged("nan")}
    assert [state.name for state in run_points(points, workdir, console(tmp_path), run=Runs(points, vain))] == [
        "failed"
    ] * 2
    with pytest.raises(StartedInVain, match=r"1 of 2 points fail at every start; why is in .*sweep\.md"):
        run_points(points, workdir, console(tmp_path), run=Runs(points, {(0.3, 0): vain[0.3, 0]}))
    assert "3 starts in a row" in (workdir / "sweep.md").read_text()


def test_a_machine_on_which_nothing_runs_ends_and_leaves_the_points_to_others(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1,2"), tmp_path / "sweep"
    broken = {(beta, 0): RuntimeError("no device") for beta in (0.3, 1.0, 2.0)}
    with pytest.raises(RuntimeError, match="no device"):
        run_points(points, workdir, console(tmp_path), run=Runs(points, broken))
    assert [state.name for state in list_points(points, workdir, console(tmp_path))] == ["failed", "failed", "waiting"]
    again = Runs(points)
    assert {state.name for state in run_points(points, workdir, console(tmp_path), run=again)} == {"done"}
    assert again.begun == [(2.0, 0), (0.3, 0), (1.0, 0)]


def test_a_point_that_runs_or_fails_elsewhere_is_waited_for_and_then_tried(tmp_path, monkeypatch):
    points, workdir = points_of("objective.beta=0.3,1"), tmp_path / "sweep"
    elsewhere = workdir / "objective.beta=1"
    runs, looks = Runs(points), []

    def fails_elsewhere(seconds):
        looks.append(said(tmp_path))
        if len(looks) == 2:
            held_elsewhere.close()
            (elsewhere / "failed.txt").write_text("no device there")

    monkeypatch.setattr(one_by_one.time, "sleep", fails_elsewhere)
    held_elsewhere = ExitStack()
    workdir.mkdir()
    write_json(workdir / "sweep.json", {"points": []})
    with held_elsewhere:
        held_elsewhere.enter_context(open_run_directory(elsewhere, points[1].identity))
        states = run_points(points, workdir, console(tmp_path), run=runs)
    assert len(looks) == 2 and "waiting for 1 points that run elsewhere" in looks[0]
    assert runs.begun == [(0.3, 0), (1.0, 0)]
    assert {state.name for state in states} == {"done"}
    assert not (elsewhere / "failed.txt").exists()


def test_another_grid_in_the_same_directory_keeps_what_is_known_of_the_first(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1"), tmp_path / "sweep"
    run_points(points, workdir, console(tmp_path), run=Runs(points, {(0.3, 0): Diverged("nan")}))
    other = points_of("objective.beta=1,2")
    run_points(other, workdir, console(tmp_path), run=Runs(other))
    states = list_points(points_of("objective.beta=0.3,1,2"), workdir, console(tmp_path))
    assert [(state.name, state.why) for state in states] == [("failed", "nan"), ("done", None), ("done", None)]


def test_a_preempted_sweep_stops_and_goes_on(tmp_path):
    points, workdir = points_of("objective.beta=0.3,1,2", train__iterations=9), tmp_path / "sweep"
    with pytest.raises(Preempted):
        run_points(points, workdir, console(tmp_path), run=Runs(points, {(1.0, 0): Preempted("stopped")}))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    states = list_points(points, workdir, console(tmp_path))
    assert [state.words for state in states][1:] == ["interrupted at iteration 4 of 9", "waiting"]
    assert states[0].words.startswith("done, p̂ ") and ", p* 0." in states[0].words
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    again = Runs(points)
    run_points(points, workdir, console(tmp_path), run=again)
    assert again.begun == [(1.0, 0), (2.0, 0)]


def test_sigterm_outside_of_a_run_stops_the_sweep_and_nobody_takes_it_for_a_failure(tmp_path):
    points, workdir, begun = points_of("objective.beta=0.3,1"), tmp_path / "sweep", []

    def starting(config, directory, console):
        begun.append(config.objective.beta)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:  # as checks of a config do with a user's own module
            raise ValueError("swallowed") from None

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="the same command resumes the sweep"):
        run_points(points, workdir, console(tmp_path), run=starting)
    assert (begun, signal.getsignal(signal.SIGTERM)) == ([0.3], before)


def test_directories_of_something_else_are_left_alone(tmp_path):
    points, workdir = points_of("seed=0,1"), tmp_path / "sweep"
    run_points(points, workdir, console(tmp_path), run=Runs(points))
    other = points_of("seed=0,1", objective__beta=2.0)
    runs = Runs(other)
    for act in (lambda: run_points(other, workdir, console(tmp_path), run=runs), lambda: list_points(other, workdir)):
        with pytest.raises(RunDirectoryError, match=r"objective\.beta: 1\.0 there, 2\.0 now"):
            act()
    assert runs.begun == []
    for act in (run_points, list_points):
        with pytest.raises(RunDirectoryError, match="holds no sweep"):
            act(points, workdir / "seed=0", console(tmp_path))
    (workdir / "sweep.json").write_text("[")
    with pytest.raises(RunDirectoryError, match="not readable as the record of a sweep"):
        run_points(points, workdir, console(tmp_path), run=runs)
    assert [state.name for state in list_points(points, tmp_path / "none", console(tmp_path))] == ["waiting"] * 2
    assert not (tmp_path / "none").exists()


def test_the_figure_shows_each_label_with_the_curve_of_its_objective(tmp_path, monkeypatch):
    points = points_of("objective.name=GRPO,GRPO_TRL,DR_GRPO; objective.beta=0.5,2; seed=0,1")
    shown = {}
    monkeypatch.setattr(
        one_by_one, "plot_sweep", lambda path, curves, points, title: shown.update(curves=curves, points=points)
    )
    run_points(points, tmp_path / "sweep", console(tmp_path), run=Runs(points, {(2.0, 1): Diverged("no")}))
    labels = [label for label, _, _ in shown["curves"]]
    assert labels[:2] == ["objective.name=GRPO", "objective.name=GRPO_TRL"]
    assert len(shown["points"]) == 9
    for label, betas, p_star in shown["curves"]:
        at = {
            seed: next(p for p in shown["points"] if (p["label"], p["beta"], p["seed"]) == (label, 0.5, seed))
            for seed in (0, 1)
        }
        # Success probabilities are 16ths here, and the curve is the seeds' mean.
        assert np.interp(0.5, betas, p_star) == pytest.approx((at[0]["p"] + at[1]["p"]) / 2, abs=0.02)
        assert at[0]["low"] < at[0]["p"] < at[0]["high"]
    assert abs(shown["curves"][0][2] - shown["curves"][1][2]).max() > 0.02


@pytest.mark.parametrize("objective", [GRPO, GRPO_TRL])
def test_the_curve_is_the_forecast_at_every_beta(objective):
    successes = np.array([0, 3, 30, 64, 61])
    betas = np.array([0.1, 0.7, 5.0])
    curve = p_star_curve(successes / 64, betas, trials=64, objective=objective, group_size=4)
    shape = {"objective": objective, "group_size": 4, "confidence": 0.95}
    expected = [float(forecast.make_forecast(successes, 64, beta=float(beta), **shape).mean_p_star) for beta in betas]
    np.testing.assert_allclose(curve, expected, atol=1e-9)
    assert jax.numpy.zeros(()).dtype == np.float32  # double precision was for the curve only


def test_a_sweep_without_beta_has_no_figure(tmp_path):
    points = points_of("seed=0,1")
    run_points(points, tmp_path / "sweep", console(tmp_path), run=Runs(points))
    assert {path.name for path in Path(tmp_path / "sweep").iterdir()} == {"sweep.json", "sweep.md", "seed=0", "seed=1"}

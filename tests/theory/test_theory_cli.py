"""The command line: its numbers, its files, and exactly one line on stderr for every bad input."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.theory import (
    Group,
    Mean,
    MeanOnly,
    attainable_point,
    flow_point,
    plan,
    predict,
    predict_attainable,
)
from grpo_jax.theory.__main__ import main

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A finished measurement of four prompts, as `launch.py` leaves it."""
    config = {"rollout.group_size": 4, "objective.name": "GRPO", "objective.epsilon": None, "evaluate.confidence": 0.9}
    config |= {"objective.beta": 1.0, "objective.scale": None, "objective.kl": None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "reference.json").write_text(
        json.dumps({"successes": [0, 5, 20, 50], "trials": 100, "kl": 0.0}), encoding="utf-8"
    )
    return tmp_path


def numbers(tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "numbers.json"
    assert main([*arguments, f"--json={out}"]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_directory_of_evaluations_alone_names_them(run_directory, capsys):
    (run_directory / "reference.json").unlink()
    place = run_directory / "evaluations" / "reference-mine"
    place.mkdir(parents=True)
    refused(["plan", f"--from={run_directory}", "--beta=1"], "no finished evaluation (prompts.jsonl)", capsys)
    (place / "prompts.jsonl").write_text('{"successes": 1, "trials": 4}\n')
    refused(["plan", f"--from={run_directory}", "--beta=1"], f"but evaluations: give --from={place}", capsys)
    refused(["plan", f"--from={place}", "--beta=1"], "config.json: No such file", capsys)
    (place / "config.json").write_text('{"rollout.group_size": 4, "evaluate.confidence": 0.9}')
    written = numbers(run_directory, "plan", f"--from={place}", "--beta=1")
    assert (written["prompts"], written["group_size"], written["confidence"]) == (1, 4, 0.9)
    assert written["rows"][0]["dead_groups_start"] == 0.0  # the one group of four has a success and failures


def test_a_plan_of_typed_probabilities(tmp_path, capsys):
    """The trainer's GRPO at β = 1 and 3, G = 8 by default; p_ref taken as exact."""
    written = numbers(tmp_path, "plan", "--p_ref=0.01,0.2,0.5", "--beta=1,3")
    weights = Group(8, epsilon=1e-4)
    for row, beta in zip(written["rows"], (1.0, 3.0), strict=True):
        ends = [float(flow_point(p, beta=beta, weights=weights)) for p in (0.01, 0.2, 0.5)]
        assert row["p_star"] == row["p_star_low"] == pytest.approx(sum(ends) / 3, rel=1e-5)
    said = capsys.readouterr()
    assert said.err == ""
    assert "GRPO, groups of 8" in said.out
    assert "taken as exact" in said.out
    assert re.search(r"sweep +β from [\d.]+ to [\d.]+", said.out)
    assert len([line for line in said.out.splitlines() if re.match(r" *[13] +0\.\d{4} ", line)]) == 2


def test_trials_give_intervals_and_rounded_probabilities_their_counts(tmp_path):
    """0.33 is 1 of 3 to its digits; Wilson's interval of 1/3 is [0.0615, 0.7923]."""
    row = numbers(tmp_path, "plan", "--p_ref=0.33", "--trials=3", "--beta=1e6")["rows"][0]
    assert (row["p_ref"], row["p_ref_low"], row["p_ref_high"]) == pytest.approx((1 / 3, 0.0615, 0.7923), abs=1e-4)


def test_a_run_directory_gives_the_counts_the_group_size_the_objective_and_the_confidence(run_directory, tmp_path):
    written = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1")
    assert (written["objective"], written["group_size"], written["prompts"], written["confidence"]) == (
        "GRPO",
        4,
        4,
        0.9,
    )
    expected = predict([0, 5, 20, 50], 100, beta=1.0, weights=Group(4, epsilon=1e-4), confidence=0.9)
    assert written["rows"][0]["p_star"] == pytest.approx(expected.mean_p_star, rel=1e-9)
    assert written["rows"][0]["p_star_low"] == pytest.approx(expected.mean_p_star_low, rel=1e-9)
    assert 0.05 < written["rows"][0]["dead"] < 0.25  # the prompt without a success, if p_ref < .0025
    other = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1", "--group_size=16", "--objective=DR_GRPO")
    assert (other["objective"], other["group_size"]) == ("DR_GRPO", 16)


def test_keys_of_the_run_change_its_objective(run_directory, tmp_path):
    config = json.loads((run_directory / "config.json").read_text(encoding="utf-8"))
    (run_directory / "config.json").write_text(
        json.dumps(config | {"objective.scale": "none", "objective.baseline": "leave_one_out"}), encoding="utf-8"
    )
    row = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=2")["rows"][0]
    expected = predict([0, 5, 20, 50], 100, beta=2.0, weights=MeanOnly(), confidence=0.9)  # Ω = 1
    assert row["p_star"] == pytest.approx(expected.mean_p_star, rel=1e-5)


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "counts.jsonl"
    path.write_text('{"successes": 5, "trials": 100, "prompt": "x"}\n\n{"trials": 10.0, "successes": 2}\n', "utf-8")
    row = numbers(tmp_path, "plan", f"--from={path}", "--beta=1e9")["rows"][0]
    assert row["p_ref"] == pytest.approx((0.05 + 0.2) / 2, rel=1e-12)
    assert row["p_star"] == pytest.approx(predict([5, 2], [100, 10], beta=1e9, weights=Group(8)).mean_p_star, rel=1e-6)


def test_the_objectives_lead_where_their_kl_does(tmp_path, capsys):
    """At β = 1, p_ref = 0.01, G = 16 a k3 loss ends near .49 where the paper's KL ends near .13."""
    k3 = numbers(tmp_path, "plan", "--p_ref=0.01", "--beta=1", "--objective=GRPO_TRL", "--group_size=16")["rows"][0]
    assert 0.45 < k3["p_star"] < 0.5
    assert "KL(π_ref‖π), not the paper's" in capsys.readouterr().out
    none = numbers(tmp_path, "plan", "--p_ref=0.01", "--beta=1", "--objective=DAPO")
    assert none["rows"][0]["p_star"] == 1.0
    assert none["recommended"] is None
    assert "no β changes anything" in capsys.readouterr().out


def test_a_target_is_solved_for_and_verified(tmp_path, capsys):
    written = numbers(tmp_path, "plan", "--p_ref=0.01,0.2,0.5", "--target=0.7")
    assert written["rows"][0]["beta"] == written["target"]["beta"]
    assert written["rows"][0]["p_star"] == pytest.approx(0.7, abs=1e-9)
    assert re.search(r"target +β = 0\.\d+ leads to p\* = 0\.7000", capsys.readouterr().out)
    assert main(["plan", "--p_ref=0.5", "--target=0.95", "--group_size=512"]) == 0
    assert "a fold jumps over it" in capsys.readouterr().out


def test_nothing_to_sweep(capsys):
    assert main(["plan", "--p_ref=0,1", "--beta=1"]) == 0
    assert "always or never succeed" in capsys.readouterr().out


def test_iterations_of_training_are_shown_where_the_speed_is_known(run_directory, tmp_path, capsys):
    without = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1")
    assert without["speed"] is None and "training" not in capsys.readouterr().out
    for unknown in ({}, {"speed": None}, {"speed": {"kappa": None}}, {"speed": {"kappa": {"mean": None}}}):
        (run_directory / "result.json").write_text(json.dumps(unknown), encoding="utf-8")
        assert main(["plan", f"--from={run_directory}", "--beta=1"]) == 0
        assert "training" not in capsys.readouterr().out
    kappa = {"mean": 0.08, "low": 0.07, "high": 0.1}
    (run_directory / "result.json").write_text(json.dumps({"speed": {"kappa": kappa}}), encoding="utf-8")
    measured = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1")
    assert "at κ = 0.08 an iteration" in capsys.readouterr().out
    (expected,) = plan([0, 5, 20, 50], 100, [1.0], weights=Group(4, epsilon=1e-4), speed=0.08)
    assert measured["rows"][0]["training"] == expected.training > 10
    given = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1", "--speed=0.8")
    assert given["speed"] == 0.8 and given["rows"][0]["training"] <= math.ceil(expected.training / 10)
    capsys.readouterr()
    refused(["plan", "--p_ref=0.2", "--beta=1", "--speed=0"], "--speed=0 must be positive", capsys)


def test_where_this_network_ends_is_shown_where_it_was_measured(run_directory, tmp_path, capsys):
    path = run_directory / "attainable.json"
    for unknown in ({"reason": "attainable.steps is 0"}, {"r2": {"mean": 0.1, "low": 0.0, "high": 0.3}, "needed": 200}):
        path.write_text(json.dumps(unknown), encoding="utf-8")
        without = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1")
        assert without["r2"] is None and without["rows"][0]["attainable"] is None
        assert "p†" not in capsys.readouterr().out
    r2 = {"mean": 0.5, "low": 0.4, "high": 0.6}
    path.write_text(json.dumps({"r2": r2, "needed": None}), encoding="utf-8")
    written = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1,3")
    printed = capsys.readouterr().out
    assert "lets R² = 0.500 [0.400, 0.600]" in printed and "p†" in printed
    weights = Group(4, epsilon=1e-4)
    for row, beta in zip(written["rows"], (1.0, 3.0), strict=True):
        wanted = predict_attainable([0, 5, 20, 50], 100, beta=beta, weights=weights, r2=Mean(**r2), confidence=0.9)
        assert row["attainable"] == pytest.approx({"mean": wanted.mean, "low": wanted.low, "high": wanted.high})
        assert row["p_ref"] < wanted.mean < row["p_star"]
    other = numbers(tmp_path, "plan", f"--from={run_directory}", "--beta=1", "--group_size=8")
    assert other["r2"] is None  # the pull of groups of 8 is another
    capsys.readouterr()
    for broken in ({"r2": {"mean": 0.5}}, {"r2": {"mean": 0.5, "low": 0.6, "high": 0.7}}, {"r2": 3}):
        path.write_text(json.dumps(broken), encoding="utf-8")
        refused(["plan", f"--from={run_directory}", "--beta=1"], '"r2" must be mean, low and high', capsys)
    exact = plan([0.2, 0.5], None, [1.0], weights=weights, r2=Mean(**r2))[0].attainable
    wanted = [attainable_point(jnp.array([0.2, 0.5]), beta=1.0, weights=weights, r2=x).mean() for x in r2.values()]
    np.testing.assert_allclose(exact, np.array(wanted), atol=1e-6)
    with pytest.raises(ValueError, match="needs kl='reverse'"):
        plan([0.2], None, [1.0], weights=weights, kl="forward", r2=Mean(**r2))


def test_the_figure_is_a_picture(run_directory, tmp_path):
    path = tmp_path / "plan.png"
    assert main(["plan", f"--from={run_directory}", "--beta=1,3", f"--figure={path}"]) == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 20_000


def test_explain_says_it_for_each(capsys):
    assert main(["explain", "--p_ref=0.01,0.2", "--beta=1,2", "--group_size=8", "--objective=DR_GRPO"]) == 0
    text = capsys.readouterr().out
    assert text.count("p_ref = ") == 4
    end = 1 / (1 + 99 * math.exp(-7 / 8))  # Ω = 7/8
    assert f"to p* = {end:.4g} and stop" in text.split("\n\n")[0]


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["plan", "--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert "python -m grpo_jax.theory plan --p_ref" in capsys.readouterr().out


GOOD = ["plan", "--p_ref=0.2", "--beta=1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["plot"], "invalid choice"),
        ([*GOOD, "--colour=red"], "unrecognized"),
        ([*GOOD, "extra"], "unrecognized"),
        (["plan", "--beta=1"], "either --p_ref or --from"),
        ([*GOOD, "--from=x"], "not both"),
        (["plan", "--p_ref=0.2"], "either --beta or --target"),
        ([*GOOD, "--target=0.5"], "not both"),
        (["plan", "--p_ref=1.2", "--beta=1"], "--p_ref=1.2 is not a probability"),
        (["plan", "--p_ref=-0.1", "--beta=1"], "--p_ref=-0.1 is not a probability"),
        (["plan", "--p_ref=nan", "--beta=1"], "--p_ref=nan is not a probability"),
        (["plan", "--p_ref=", "--beta=1"], "--p_ref='' is not a number"),
        (["plan", "--p_ref=0.2,,0.3", "--beta=1"], "is not a number"),
        (["plan", "--p_ref=half", "--beta=1"], "--p_ref='half' is not a number"),
        (["plan", "--p_ref=0.2", "--beta=0"], "--beta=0 must be positive"),
        (["plan", "--p_ref=0.2", "--beta=-1"], "--beta=-1 must be positive"),
        (["plan", "--p_ref=0.2", "--beta=nan"], "--beta=nan must be positive"),
        (["plan", "--p_ref=0.2", "--beta=inf"], "--beta=inf must be positive"),
        (["plan", "--p_ref=0.2", "--beta=one"], "--beta='one' is not a number"),
        (["plan", "--p_ref=0.2", "--target=0.1"], "not above the mean p_ref of 0.2"),
        (["plan", "--p_ref=0.2", "--target=0.2"], "not above the mean p_ref"),
        (["plan", "--p_ref=0.2", "--target=1"], "inside (0, 1)"),
        (["plan", "--p_ref=0.2", "--target=0"], "inside (0, 1)"),
        (["plan", "--p_ref=0.2", "--target=nan"], "inside (0, 1)"),
        (["plan", "--p_ref=0.2", "--target=x"], "--target='x' is not a number"),
        (["plan", "--p_ref=0,0.2", "--target=0.6"], "not below 0.5"),
        (["plan", "--p_ref=0.2", "--beta=1", "--objective=MIRROR_GRPO"], "theory.mirror_steps knows the pace"),
        (["explain", "--p_ref=0.2", "--beta=1", "--objective=TWO_KL_GRPO"], "GRPO's at the same β"),
        (["plan", "--p_ref=0.2", "--target=0.6", "--objective=DAPO"], "without a KL term"),
        ([*GOOD, "--objective=PPO"], "objective 'PPO' is not one of GRPO"),
        ([*GOOD, "--group_size=1"], "group_size must be at least 2"),
        ([*GOOD, "--group_size=8.5"], "group_size='8.5' is not a whole number"),
        ([*GOOD, "--group_size=5000"], "more than 1024"),
        ([*GOOD, "--trials=0"], "--trials must be at least 1"),
        ([*GOOD, "--trials=ten"], "--trials='ten' is not a whole number"),
        (
            ["plan", "--p_ref=0.21", "--trials=8", "--beta=1"],
            "--p_ref=0.21 is no number of successes in --trials=8; nearest is 2/8",
        ),
        ([*GOOD, "--confidence=1"], "--confidence=1 must be inside"),
        ([*GOOD, "--confidence=nan"], "--confidence=nan must be inside"),
        ([*GOOD, "--json=/nowhere/x.json"], "/nowhere/x.json"),
        (["plan", "--from=/nowhere", "--beta=1"], "/nowhere: No such file"),
        (["plan", "--from=x.jsonl", "--trials=3", "--beta=1"], "--trials goes with --p_ref"),
        (["explain", "--beta=1"], "--p_ref is missing"),
        (["explain", "--p_ref=0.2"], "--beta is missing"),
        (["explain", "--p_ref=2", "--beta=1"], "--p_ref=2 is not a probability"),
        (["explain", "--p_ref=0.2", "--beta=0"], "must be positive"),
    ],
)
def test_a_bad_command_is_one_line_and_code_2(arguments, said, capsys):
    refused(arguments, said, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", ": no rows"),
        (b"\n \n", ": no rows"),
        (b'{"successes": 1, "trials": 4}\n{"successes": 5, "trials": 4}\n', ":2: successes=5 exceed trials=4"),
        (b'{"successes": 1, "trials": 4}\n\n{"successes": 1, "tri', ":3: not JSON"),
        (b'{"successes": 1}', ':1: not a JSON object with "successes" and "trials"'),
        (b"[1, 4]", ":1: not a JSON object"),
        (b'{"successes": NaN, "trials": 4}', ":1: successes=nan is not a whole number"),
        (b'{"successes": 1, "trials": Infinity}', ":1: trials=inf is not a whole number"),
        (b'{"successes": true, "trials": 4}', ":1: successes=True is not a whole number"),
        (b'{"successes": null, "trials": 4}', ":1: successes=None is not a whole number"),
        (b'{"successes": 1.5, "trials": 4}', ":1: successes=1.5 is not a whole number"),
        (b'{"successes": "one", "trials": 4}', ":1: successes='one' is not a whole number"),
        (b'{"successes": -1, "trials": 4}', ":1: successes must be at least 0"),
        (b'{"successes": 0, "trials": 0}', ":1: trials must be at least 1"),
        (b'{"successes": 1, "trials": 1' + b"0" * 400 + b"}", ":1: trials must be at least 1 and below 2**53"),
        (b'{"successes": 1, "trials": 1' + b"0" * 9000 + b"}", ":1: not JSON"),
        (b'{"successes": 1e400, "trials": 4}', ":1: successes=inf is not a whole number"),
        (b"\xff\xfe\x00", ":1: not UTF-8"),
        (b"[" * 200_000, ":1: not JSON"),
    ],
    ids=range(19),
)
def test_a_bad_file_is_named_with_its_line(text, said, tmp_path, capsys):
    path = tmp_path / "counts.jsonl"
    path.write_bytes(text)
    refused(["plan", f"--from={path}", "--beta=1"], f"counts.jsonl{said}", capsys)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("config.json", '{"objective.name": "PPO"}', "objective 'PPO' is not one of"),
        ("config.json", '{"objective.name": "GRPO", "objective.ddof": 2}', "config.json: ddof=2"),
        ("config.json", '{"objective.name": "GRPO", "objective.epsilon": "x"}', "config.json: "),
        ("config.json", '{"rollout.group_size": 1.5}', "group_size=1.5 is not a whole number"),
        ("config.json", '{"evaluate.confidence": "high"}', "--confidence='high' is not a number"),
        ("reference.json", None, "holds no measured reference (reference.json), and no finished evaluation"),
        ("reference.json", '{"trials": 4}', '"successes" must be a list'),
        ("reference.json", '{"successes": [], "trials": 4}', '"successes" must be a list'),
        ("reference.json", '{"successes": [1, 9], "trials": 4}', "prompt 1: successes=9 exceed trials=4"),
        ("reference.json", '{"successes": [1]}', "trials=None is not a whole number"),
    ],
)
def test_a_bad_run_directory_is_named(name, text, said, run_directory, capsys):
    (run_directory / name).unlink()
    if text is not None:
        (run_directory / name).write_text(text, encoding="utf-8")
    refused(["plan", f"--from={run_directory}", "--beta=1"], said, capsys)


def test_a_missing_matplotlib_is_a_clear_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused([*GOOD, "--figure=x.png"], "--figure needs matplotlib", capsys)


def refused(arguments, said, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("grpo_jax.theory: ")
    assert said in shown.err


def test_a_file_of_many_rows_costs_what_its_distinct_counts_do(tmp_path):
    path = tmp_path / "many.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"successes": {i % 101}, "trials": 100}}\n' for i in range(101_000))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f'{{"successes": {i}, "trials": 100}}\n' for i in range(101)), encoding="utf-8")
    many, once = (numbers(tmp_path, "plan", f"--from={p}", "--beta=1")["rows"][0] for p in (path, few))
    # A thousand times the prompts know (a, b) better, which moves what is known of each of them a little.
    assert many["p_star"] == pytest.approx(once["p_star"], abs=5e-4)
    narrower = (once["p_star_high"] - once["p_star"]) / (many["p_star_high"] - many["p_star"])
    assert narrower == pytest.approx(math.sqrt(1000), rel=0.05)


def test_the_module_runs_as_a_command_and_needs_no_more_than_jax():
    """In a process of its own, where importing anything of the training stack fails."""
    code = (
        "import runpy, sys\n"
        "for name in ('flax', 'optax', 'orbax', 'absl', 'ml_collections', 'matplotlib', 'rich', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['theory', 'explain', '--p_ref=0.2', '--beta=1']\n"
        "runpy.run_module('grpo_jax.theory', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    end = float(flow_point(0.2, beta=1.0, weights=Group(8, epsilon=1e-4)))
    assert f"to p* = {end:.4g} and stop" in done.stdout
    command = [sys.executable, "-m", "grpo_jax.theory", "plan", "--p_ref=2", "--beta=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "grpo_jax.theory: --p_ref=2 is not a probability in [0, 1]\n"

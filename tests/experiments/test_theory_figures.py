"""The figures of the theory: every command writes a picture and strict JSON, whose numbers are the known ones."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.theory import (
    clipped_branches,
    clipping,
    figures,
    finite_groups,
    kl_estimators,
    local_bound,
    off_policy,
    staleness,
    success_map,
    table1,
    trajectories,
    variants,
    weights,
)
from grpo_jax.theory import Whitened, bistable_window, fixed_points
from grpo_jax.theory.clipping import clipped_success_map

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = (
    clipped_branches,
    clipping,
    finite_groups,
    kl_estimators,
    local_bound,
    off_policy,
    staleness,
    success_map,
    table1,
    trajectories,
    variants,
    weights,
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Runs an experiment once, and reads back what it wrote."""
    folder, done = tmp_path_factory.mktemp("figures"), {}

    def read(module):
        name = module.__name__.rpartition(".")[2]
        if name not in done:
            with jax.enable_x64(True):
                module.experiment(folder, quick=True)
            text = (folder / f"{name}.json").read_text(encoding="utf-8")
            done[name] = json.loads(text, parse_constant=refuse)
            if name != "table1":
                with Image.open(folder / f"{name}.png") as image:
                    image.load()
                    assert min(image.size) >= 800 and np.asarray(image.convert("L")).std() > 15, name
        return done[name]

    read.folder = folder
    return read


def logit(p):
    return math.log(p / (1 - p))


def test_figure_1_is_the_odds_of_failure_and_its_inverse(numbers):
    curves = numbers(weights)["figure_1"]
    p = np.array(curves["p"])
    np.testing.assert_allclose(curves["omega_plus"], np.sqrt((1 - p) / p), rtol=1e-12)
    np.testing.assert_allclose(curves["omega_minus"], np.sqrt(p / (1 - p)), rtol=1e-12)
    ends = {name: values[0] for name, values in numbers(weights)["omega"].items()}
    assert ends["groups of 16"] == pytest.approx(math.sqrt(15), rel=1e-3)
    assert ends["population, ε = 0"] == pytest.approx(1000, rel=1e-5)
    assert ends["mean only (Dr. GRPO)"] == 1


def test_figure_2_has_the_numbers_of_the_picture_at_the_epsilon_it_is_drawn_with(numbers):
    found = {
        (panel["epsilon"], panel["p_ref"], curve["beta"]): curve
        for panel in numbers(success_map)["panels"]
        for curve in panel["curves"]
    }
    assert found[1e-2, 1e-4, 0.2]["minimum"] == pytest.approx(0.645, abs=5e-4)
    assert found[1e-2, 0.2, 1.0]["minimum"] == pytest.approx(0.640, abs=5e-4)
    assert found[1e-2, 0.2, 5.0]["h(1)"] == pytest.approx(0.65, abs=5e-3)
    assert found[1e-5, 1e-4, 0.2]["minimum"] == pytest.approx(0.688, abs=5e-4)
    assert found[1e-5, 0.2, 1.0]["minimum"] == pytest.approx(0.649, abs=5e-4)
    assert found[1e-5, 0.2, 5.0]["h(1)"] == pytest.approx(1.0, abs=1e-12)
    points = found[1e-5, 0.2, 1.0]["fixed_points"]
    assert [point["p"] for point in points] == pytest.approx([0.681283437786, 0.934713591453, 1.0], abs=1e-11)
    assert [point["stable"] for point in points] == [True, False, True]
    for (epsilon, p_ref, beta), curve in found.items():
        # h by hand, at the points of the grid, and its least value there not below the one at p = ½.
        p = np.array(numbers(success_map)["p"])
        by_hand = 1 / (1 + (1 - p_ref) / p_ref * np.exp(-1 / (beta * np.sqrt(p * (1 - p) + epsilon))))
        np.testing.assert_allclose(curve["h"], by_hand, atol=1e-12)
        assert min(curve["h"]) >= curve["minimum"] - 1e-12


def test_figure_4_and_the_thresholds(numbers):
    found = numbers(local_bound)
    assert dict(zip(found["bound_table"]["p"], found["bound_table"]["bound"], strict=True)) == pytest.approx(
        {0.01: 4.91723, 0.1: 1.33311114197, 0.5: 0.0, 0.9: 1.33311114197}, abs=1e-5
    )
    # v|2p−1|/(2(v+ε)^1.5) is largest at v = 2ε but for the factor |2p−1|: 1/(3√3 √ε).
    assert found["largest_bound"] == pytest.approx(1 / (3 * math.sqrt(3e-5)), rel=1e-4)
    assert found["flip_limit"] == pytest.approx(0.010037, abs=5e-7)
    assert found["cusp"]["p_ref"] == pytest.approx(0.99960, abs=5e-6)
    low, high = np.array(found["folds"]["beta"]).T
    assert (low < high).all() and high[-1] / low[-1] < 1.001  # they meet at the cusp
    # β_c at ε → 0 solves Δ = ln((Δ+2)/(Δ−2)) − L_ref with β = 2/√(Δ²−4).
    for p_ref, beta in zip(found["folds"]["p_ref"], low, strict=True):
        if p_ref < 0.5:
            delta = 2 * math.sqrt(1 + 1 / beta**2)
            assert delta == pytest.approx(math.log((delta + 2) / (delta - 2)) - logit(p_ref), rel=1e-3)
    opens, closes = np.array(found["flips"]["beta"]).T
    assert (opens < closes).all() and closes[-1] / opens[-1] < 1.01  # the window closes at the limit


@pytest.mark.parametrize(
    ("p_ref", "beta", "limit"), [(0.2, 1.0, 0.6813), (0.2, 5.0, 0.2807), (0.5, 5.0, 0.6007), (0.8, 5.0, 0.8813)]
)
def test_figure_5_ends_where_the_picture_does_from_either_start(numbers, p_ref, beta, limit):
    ends = [
        orbit["p"][-1]
        for panel in numbers(trajectories)
        for orbit in panel["orbits"]
        if (panel["p_ref"], orbit["beta"]) == (p_ref, beta)
    ]
    assert ends == pytest.approx([limit, limit], abs=5e-5)


def test_the_chaotic_panel_of_figure_5_needs_the_start_of_the_picture(numbers):
    from_picture, from_reference = (
        next(orbit for orbit in panel["orbits"] if orbit["beta"] == 5.0)
        for panel in numbers(trajectories)
        if panel["p_ref"] == 1e-4
    )
    assert from_picture["p"][50] == pytest.approx(0.0442, abs=5e-5)
    assert from_picture["limit"]["kind"] == "chaos"
    assert from_reference["p"][50] == pytest.approx(1.0, abs=1e-9)


def test_table_1(numbers):
    rows = {(row["variant"], row["p_ref"], row["beta"]): row for row in numbers(table1)}
    assert len(rows) == 6 * len(table1.CASES)
    cycle = rows["GRPO", 1e-3, 3.0]
    assert cycle["limit"]["p"] == pytest.approx([0.00199486349927, 0.633011579742], abs=1e-11)
    assert cycle["fixed_points"][0]["multiplier"] == pytest.approx(-1.323, abs=5e-4)
    assert not cycle["fixed_points"][0]["stable"]
    assert rows["GRPO", 0.2, 1.0]["limit"]["p"] == pytest.approx(0.681283437786, abs=1e-11)
    for p_ref, beta in table1.CASES:
        assert logit(rows["Dr. GRPO", p_ref, beta]["limit"]["p"]) == pytest.approx(logit(p_ref) + 1 / beta, abs=1e-9)
        two_kl = rows["two-KL Dr. GRPO", p_ref, beta]
        assert logit(two_kl["limit"]["p"]) == pytest.approx(logit(p_ref) + 2 / beta, abs=1e-9)
        assert two_kl["fixed_points"][0]["multiplier"] == pytest.approx(0.5)
        for name in ("mirror GRPO", "mirror Dr. GRPO"):
            assert rows[name, p_ref, beta]["limit"]["p"] == 1
        assert rows["mirror Dr. GRPO", p_ref, beta]["fixed_points"][0]["multiplier"] == pytest.approx(
            math.exp(-1 / beta)
        )
    for row in rows.values():  # a limit that is one point is a stable fixed point of the list
        if row["limit"]["kind"] == "fixed":
            distances = [abs(point["p"] - row["limit"]["p"]) for point in row["fixed_points"] if point["stable"]]
            assert min(distances) < 1e-9, row
    text = (numbers.folder / "table1.md").read_text(encoding="utf-8")
    assert "0.0020 ↔ 0.6330" in text and "0.6813 (0.389)" in text
    columns = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert columns == [6] * 8 + [7] * 8  # an unescaped bar would add a column


def test_damping_cures_the_cycle_at_the_same_fixed_point(numbers):
    orbits = {orbit["name"]: orbit for orbit in numbers(variants)[0]["orbits"]}
    assert orbits["GRPO"]["limit"]["period"] == 2
    assert orbits["two-KL GRPO, α = ½, β = 6"]["p"][-1] == pytest.approx(0.015123, abs=5e-7)
    rises = np.array(orbits["mirror Dr. GRPO"]["p"])
    steps = np.diff(np.log(rises / (1 - rises)))
    np.testing.assert_allclose(steps, 1 / 3, rtol=1e-9)
    assert (np.diff(orbits["mirror GRPO"]["p"]) >= 0).all()


def test_the_clipped_branches_are_flat_where_clipped_and_as_steep_as_their_weights_elsewhere(numbers):
    shown = numbers(clipped_branches)
    ratio = np.array(shown["ratio"])
    for i, p in enumerate(shown["p_old"]):
        plus, minus = math.sqrt((1 - p) / p), math.sqrt(p / (1 - p))
        np.testing.assert_allclose(shown["success"]["clipped"][i], plus * np.minimum(ratio, 1.2), rtol=1e-12)
        np.testing.assert_allclose(shown["failure"]["clipped"][i], -minus * np.maximum(ratio, 0.8), rtol=1e-12)
        np.testing.assert_allclose(shown["success"]["plain"][i], plus * ratio, rtol=1e-12)
        np.testing.assert_allclose(shown["failure"]["plain"][i], -minus * ratio, rtol=1e-12)


def test_clipping_keeps_orbits_below_the_middle_fixed_point_and_chaos_small(numbers):
    found = numbers(clipping)
    low, middle, _ = (point["p"] for point in found["jump"]["fixed_points"])
    assert found["jump"]["plain_stays_in"][0] > middle and max(found["jump"]["clipped"]) < middle
    assert found["jump"]["clipped_stays_in"] == pytest.approx([low, low], abs=1e-9)
    assert found["chaos"]["plain_stays_in"][1] > 0.99
    assert 0.0027 < found["chaos"]["clipped_stays_in"][0] < found["chaos"]["clipped_stays_in"][1] < 0.0037
    assert found["cycle"]["plain_stays_in"] == pytest.approx([0.001994863, 0.633011580], abs=1e-9)
    assert found["cycle"]["clipped_stays_in"] == pytest.approx([0.0132, 0.0168], abs=1e-4)
    # The clipped map, by brute force: the scalar problem on a fine grid of the next p.
    for p, mapped in list(zip(found["map"]["p"], found["map"]["clipped"], strict=True))[5:-5:10]:
        x = np.linspace(1e-6, 1 - 1e-6, 200_001)
        scale = 1 / math.sqrt(p * (1 - p) + 1e-5)
        value = (1 - p) * scale * np.minimum(x, 1.2 * p) - p * scale * np.maximum(1 - x, 0.8 * (1 - p))
        value -= 0.45 * (x * np.log(x / 0.01) + (1 - x) * np.log((1 - x) / 0.99))
        assert mapped == pytest.approx(x[value.argmax()], abs=1e-5)


def test_a_clipped_orbit_passes_the_middle_fixed_point_only_where_the_caption_says():
    with jax.enable_x64(True):
        whitened, chances = Whitened(1e-5), np.random.default_rng(0)
        passed = 0
        for case in range(30):
            p_ref = 10 ** chances.uniform(-7, -0.3)
            beta = bistable_window(p_ref, weights=whitened)[0] * (1 + 10 ** chances.uniform(-3, 0))
            middle = fixed_points(p_ref, beta=beta, weights=whitened)[1]
            starts = jax.numpy.linspace(logit(p_ref), middle.logit, 500)[:-1]
            for clip in (0.2, 0.5, 1.0):
                mapped = clipped_success_map(starts, logit(p_ref), beta=beta, weights=whitened, clip=clip, logits=True)
                over = bool((mapped > middle.logit + 1e-9).any())
                assert not over or middle.p < (1 + clip) / (2 + clip), (case, p_ref, beta, clip)
                assert not (over and clip == 0.2)
                passed += over
        assert passed > 0  # the condition is needed: wide clips near the fold do let orbits pass
    delta = 2 * 2.2 / 0.2
    assert 1 / (1 + math.exp(delta - math.log((delta + 2) / (delta - 2)))) == pytest.approx(3.35e-10, rel=0.01)


def test_the_estimators_end_where_they_should(numbers):
    found = numbers(kl_estimators)["at_beta_1"]
    exact = (2 * 0.01 + 1 + math.sqrt(1 + 4 * 0.01 * 0.99)) / 4
    assert found["population, ε = 1e-5"]["0.01"]["forward"] == pytest.approx(exact, abs=1e-4)
    assert found["population, ε = 1e-5"]["0.01"]["reverse"] == pytest.approx(0.146, abs=5e-4)
    for name, reverse, forward in (("groups of 16", 0.1276, 0.4935), ("groups of 8", 0.0950, 0.4730)):
        assert found[name]["0.01"] == pytest.approx({"reverse": reverse, "forward": forward}, abs=5e-5)
    for panel in numbers(kl_estimators)["panels"]:
        for curve in panel["curves"]:
            assert (np.diff(curve["reverse"]) <= 1e-12).all() and (np.diff(curve["forward"]) <= 1e-12).all()


def test_groups(numbers):
    found = numbers(finite_groups)
    known = {
        "4": [0.1719, 0.3727, 0.5071, 0.7491, 0.8080],
        "8": [0.2596, 0.5390, 0.6983, 0.8994, 0.9278],
        "16": [0.3714, 0.7120, 0.8543, 0.9589, 0.9671],
        "64": [0.6702, 0.9451, 0.9764, 0.9905, 0.9921],
    }
    for size, row in known.items():
        assert found["shrink_table"][size] == pytest.approx(row, abs=5e-5)
        p, g = np.array(found["p"]), int(size)
        live = 1 - p**g - (1 - p) ** g
        np.testing.assert_allclose(np.array(found["plain"][size]) / live, found["dynamic"][size], rtol=1e-8)
        np.testing.assert_allclose(found["groups_per_live_group"][size], 1 / live, rtol=1e-8)
    means = {"4": 0.547, "8": 0.392761230469, "16": 0.280, "64": 0.141}
    assert found["mean_dead"] == pytest.approx(means, abs=5e-4)
    assert found["fold_beta"]["4"] is None and found["fold_beta"]["8"] is None
    assert found["fold_beta"]["∞"] == pytest.approx(0.5712, abs=5e-5)


def test_off_policy_steps_gain_what_the_identity_says_and_no_less_than_the_bounds(numbers):
    found = numbers(off_policy)
    for part in (found["line"], found["cloud"]):
        gain, bound, paper = (np.array(part[name]) for name in ("gain", "bound", "paper_bound"))
        np.testing.assert_allclose(part["identity"], gain, atol=1e-12)
        assert (gain >= bound - 1e-12).all() and (bound >= paper).all()
    after = np.array(found["line"]["p"]) >= found["p_sampler"]
    np.testing.assert_allclose(
        np.array(found["line"]["bound"])[after], np.array(found["line"]["gain"])[after], atol=1e-12
    )
    assert found["cost"]["per_tv"][-1] == pytest.approx(1, abs=1e-3) and found["cost"]["per_tv"][0] > 290
    assert [max(schedule["updates"]) for schedule in found["schedules"]] == [0, 5, 5, 5]


def test_a_run_on_drawn_groups_swings_where_the_recursion_does(numbers):
    found = numbers(staleness)
    assert [path["swing"] for path in found["paths"]] == pytest.approx(
        [0, 0, 2.7, 6.8], abs=0.1
    )  # at ten times the step
    assert found["critical_delay"] == pytest.approx(2.8025, abs=1e-4)
    assert 20 < found["run_critical_updates"] < 60
    for path in found["run"]:
        sampled, predicted = (np.log(np.array(x) / (1 - np.array(x))) for x in (path["sampled"], path["predicted"]))
        assert np.abs(sampled - predicted).max() < 0.1
        assert (np.ptp(sampled[-160:]) > 2) == (path["refresh"] > found["run_critical_updates"])


def test_what_is_not_finite_becomes_null(tmp_path):
    figures.write_json(tmp_path / "x.json", {"a": [np.inf, float("nan"), np.float32(0.5)], "b": jax.numpy.zeros(2)})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == {"a": [None, None, 0.5], "b": [0, 0]}


def test_the_command_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    }
    command = [sys.executable, "-m", "experiments.theory.weights", "--quick"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"weights.png", "weights.json"}
    wrong = subprocess.run([*command, "stray"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert wrong.returncode != 0 and "not understood: stray" in wrong.stderr + wrong.stdout


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_experiment_is_in_the_index(module):
    name = module.__name__
    assert f"python -m {name}" in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert f"python -m {name} [--out=runs/theory]" in module.__doc__

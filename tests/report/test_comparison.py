"""Two evaluations compared: tests that are exact, have their size and their power, and refusals that name what is wrong."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from grpo_jax.report import comparison
from grpo_jax.report.__main__ import main
from grpo_jax.report.comparison import ComparisonError, compare, comparison_lines, mcnemar_test, sign_flip_test

ROOT = Path(__file__).resolve().parents[2]


def by_enumeration(differences):
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return np.mean([x >= abs(sum(differences)) for x in sums])


def test_the_sign_flip_test_is_the_enumeration_of_all_signs():
    random = np.random.default_rng(0)
    for size in (1, 2, 5, 10):
        for _ in range(10):
            differences = random.integers(-16, 17, size).tolist()
            assert sign_flip_test(differences) == pytest.approx(by_enumeration(differences), abs=1e-12)
    assert sign_flip_test([0, 0]) == sign_flip_test([]) == 1.0
    assert sign_flip_test([1] * 100) == pytest.approx(2.0**-99)
    assert sign_flip_test([6, -4, 10]) == sign_flip_test([3, -2, 5])  # the unit does not matter


def test_the_sign_flip_test_is_scipys():
    differences = np.random.default_rng(1).integers(-5, 8, 12)
    theirs = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(differences.tolist()) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_signs_are_sampled_where_there_are_too_many_sums(monkeypatch):
    differences = np.random.default_rng(2).integers(-16, 19, 60).tolist()
    exact = sign_flip_test(differences)
    monkeypatch.setattr(comparison, "LARGEST", 10)
    monkeypatch.setattr(comparison, "DRAWS", 20_000)
    sampled = sign_flip_test(differences)
    assert sampled == sign_flip_test(differences)  # one seed for ever
    assert abs(sampled - exact) < 5 * (exact / 20_000) ** 0.5 + 1e-4
    assert sign_flip_test([10**9, 10**9 - 1, 10**9 + 7]) == pytest.approx(0.25, abs=0.02)


def p_values(shift, repeats=1500, prompts=60, trials=16):
    """Of two measurements of prompts of all kinds, the second of them better by a shift in log-odds."""
    random = np.random.default_rng(3)
    logits = random.normal(-1.0, 2.0, (repeats, prompts))
    a, b = (random.binomial(trials, 1 / (1 + np.exp(-(logits + s)))) for s in (0.0, shift))
    return np.array([sign_flip_test(d.tolist()) for d in b - a])


def test_p_values_are_uniform_where_nothing_differs():
    """Never smaller; a little larger, since equal sums share one p-value, the sum 0 a share of 5 %."""
    values = p_values(0.0)
    for level in (0.01, 0.05, 0.2, 0.5, 0.8):
        share, noise = np.mean(values <= level), 4 * (level * (1 - level) / len(values)) ** 0.5
        assert 0.9 * level - noise < share < level + noise


def test_a_difference_is_found():
    assert np.mean(p_values(0.5, repeats=200) <= 0.05) > 0.9
    assert np.mean(p_values(-0.5, repeats=200) <= 0.05) > 0.9


def test_mcnemars_test_is_scipys():
    for gained in range(8):
        for lost in range(8):
            if gained + lost:
                theirs = stats.binomtest(gained, gained + lost).pvalue
                assert mcnemar_test(gained, lost) == pytest.approx(theirs, rel=1e-12)


def test_the_interval_covers_the_mean_difference():
    random, covered = np.random.default_rng(4), []
    for _ in range(800):
        p = random.beta(1, 3, 80)
        q = np.clip(p + 0.1 * random.beta(2, 2, 80), 0, 1)
        difference = random.binomial(16, q) / 16 - random.binomial(16, p) / 16
        interval = comparison.paired_interval(difference, 0.95)
        covered.append(interval["low"] <= 0.05 <= interval["high"])
    assert 0.93 < np.mean(covered) < 0.97
    assert comparison.paired_interval(np.array([0.1]), 0.95) == {"mean": 0.1, "low": None, "high": None}


def evaluation(directory, counts, *, trials=16, prompts=None, **settings):
    directory.mkdir(parents=True)
    prompts = prompts or [f"prompt {i}" for i in range(len(counts))]
    rows = [
        {"index": i, "prompt": prompt, "target": "4", "successes": c, "trials": trials, "greedy": 2 * c > trials}
        for i, (prompt, c) in enumerate(zip(prompts, counts, strict=True))
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "result.json").write_text(
        json.dumps({"task": "gsm8k", "samples": trials, "temperature": 1.0} | settings)
    )
    return directory


def test_a_comparison_prompt_by_prompt(tmp_path, capsys):
    a = evaluation(tmp_path / "a", [0, 4, 8, 16, 12], prompts=["p", "q", "r\x1b[31m\n", "s", "q"])
    b = evaluation(tmp_path / "b", [6, 8, 0, 7, 8], trials=8, prompts=["q", "s", "p", "r\x1b[31m\n", "q"])
    compared = compare(a, b)
    assert [(row["a"], row["b"]) for row in compared["rows"]] == [(0, 0), (0.25, 0.75), (0.5, 0.875), (1, 1), (0.75, 1)]
    assert compared["difference"]["mean"] == pytest.approx((0.5 + 0.375 + 0.25) / 5)
    assert compared["p_value"] == by_enumeration([0, 4, 3, 0, 2])
    assert (compared["better"], compared["worse"], compared["settings"]) == (3, 0, {"samples": [16, 8]})
    assert compared["greedy"] == {"gained": 2, "lost": 0, "p_value": 0.5}
    figure, out = tmp_path / "figure.png", tmp_path / "compared.json"
    assert main(["compare", str(a), str(b), f"--figure={figure}", f"--json={out}"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "0.500 → 0.875  ✗ → ✓   r\\x1b[31m\\n" in said
    assert "samples differs: 16 | 8" in said
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert json.loads(out.read_text()) == compared
    assert said.split("\n")[:-1] == comparison_lines(compared)


def test_settings_that_differ_are_noted(tmp_path):
    settings = {"verifier": ["a:b", "a:c"], "chat": [False, True], "system": [None, "Be brief."], "seed": [0, 1]}
    a = evaluation(tmp_path / "a", [1, 2], **{name: values[0] for name, values in settings.items()})
    b = evaluation(tmp_path / "b", [1, 3], **{name: values[1] for name, values in settings.items()})
    compared = compare(a, b)
    assert compared["settings"] == settings
    assert "note      system differs: None | Be brief." in comparison_lines(compared)


def test_other_prompts_are_refused_or_left_out_and_counted(tmp_path):
    a = evaluation(tmp_path / "a", [1, 2, 3], prompts=["p", "q", "q"])
    b = evaluation(tmp_path / "b", [5, 6], prompts=["q", "x"])
    with pytest.raises(ComparisonError, match=r"1 are in both, 2 only in .*a, 1 only in .*b; --common"):
        compare(a, b)
    compared = compare(a, b, common=True)
    assert (compared["prompts"], compared["only_a"], compared["only_b"]) == (1, 2, 1)
    assert (compared["rows"][0]["a"], compared["rows"][0]["b"]) == (2 / 16, 5 / 16)
    assert "left out: 2 of a, 1 of b" in "\n".join(comparison_lines(compared))
    with pytest.raises(ComparisonError, match="no prompt in common"):
        compare(a, evaluation(tmp_path / "c", [1], prompts=["z"]), common=True)


BROKEN = {
    "unfinished": (None, "no finished evaluation"),
    "not JSON": ('{"prompt": ', "no finished evaluation"),
    "no counts": ('{"prompt": "p", "target": "4"}', r"prompts.jsonl:1: not a row .*successes"),
    "impossible": (
        '{"prompt": "p", "target": "4", "successes": 3, "trials": 2, "greedy": true}',
        "prompts.jsonl:1.*successes=3",
    ),
    "text": ('{"prompt": "p", "target": "4", "successes": "3", "trials": 2, "greedy": true}', "successes is not int"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_evaluation_is_one_line(case, tmp_path, capsys):
    content, message = BROKEN[case]
    good, bad = evaluation(tmp_path / "good", [1, 2]), evaluation(tmp_path / "bad", [1, 2])
    if content is None:
        (bad / "result.json").unlink()
    else:
        (bad / "prompts.jsonl").write_text(content + "\n")
    with pytest.raises(ComparisonError, match=message):
        compare(good, bad)
    assert main(["compare", str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo_jax.report: ")
    assert error.count("\n") == 1


def test_a_run_directory_is_answered_with_its_evaluations(tmp_path):
    good = evaluation(tmp_path / "run" / "evaluations" / "reference", [1, 2])
    with pytest.raises(ComparisonError, match=r"there are .*run/evaluations/reference\)"):
        compare(tmp_path / "run", good)


@pytest.mark.parametrize("arguments", [[], ["compare", "a"], ["compare", "a", "b", "--confidence=2"], ["draw"]])
def test_a_bad_command_line_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_starts_without_jax():
    code = "import sys, grpo_jax.report.__main__; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(loaded.split()) & {"jax", "jaxlib", "flax", "scipy", "matplotlib", "absl"}

"""The experiment on verifiers counts what it says, and its p* solves the recurrence of a noisy verifier."""

import json
import math

import pytest

from experiments import rewritten_answers, verifiers
from grpo_jax.theory import omega

SOLUTIONS = [
    "6 * 7 = <<6*7=42>>42 apples.\nOne is lost: 42 - 1 = 41\n#### 41",
    "40 * 30 = 1200\nSo $1,200\n#### 1,200",
    "So 7 - 9 = -2\n#### -2",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    lines = [json.dumps({"question": "?", "answer": solution}) + "\n" for solution in SOLUTIONS]
    (folder / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    verifiers.experiment(folder, folder / "out", quick=True)
    return json.loads((folder / "out" / "verifiers.json").read_text(encoding="utf-8"))


def test_rows_and_their_rewrites(tmp_path):
    (tmp_path / "rows").write_text("".join(json.dumps({"answer": text}) + "\n" for text in SOLUTIONS), encoding="utf-8")
    rows = rewritten_answers.read(tmp_path / "rows")
    assert [(row.answer, row.step, row.other) for row in rows] == [(41, "1", 1200), (1200, "30", -2), (-2, "9", 41)]
    wrong = [rewrite(row) for rewrite in rewritten_answers.MISTAKES.values() for row in rows]
    assert {"42", "40", "14", "2100", "410", "4.1", "-41", "2", "41.000001"} <= set(wrong)
    assert not {"41", "1200", "-2"} & {
        text for text, row in zip(wrong, rows * len(wrong), strict=False) if text == str(row.answer)
    }
    two = rewritten_answers.hedge(rewritten_answers.HEDGES["wrong and right, in two"])(rows[0], "<answer>{}</answer>")
    assert two == "6 * 7 = <<6*7=42>>42 apples.\n<answer>42</answer> and <answer>41</answer>"


def test_marked_answers_are_told_apart_and_the_last_number_is_not(results):
    assert results["rows"] == 3
    for table, share in (("right", 1), ("mistakes", 0), ("hedges", 0)):
        for label, row in results[table].items():
            for name in ("####", r"\boxed", "tag"):
                assert row[name]["accepted"] == share * row[name]["of"], (label, name)
    assert all(row["last"]["accepted"] == row["last"]["of"] for row in results["right"].values())
    assert results["hedges"]["right in prose only"]["last"] == {"accepted": 3, "of": 3}
    assert results["right"]["U+2212 (if < 0)"]["tag"] == {"accepted": 1, "of": 1}


def test_ends_solve_the_recurrence_of_a_noisy_verifier(results):
    ends = {case["case"]: case for case in results["ends"]}
    assert ends["####, mistakes"]["q_star"] == ends["no errors"]["q_star"]
    for case in results["ends"]:
        for (p_ref, beta), q in zip(results["settings (p_ref, beta)"], case["q_star"], strict=True):
            p, advantage = 1 - q, 1 - case["fnr"] - case["fpr"]
            gain = math.log(p / q) - math.log(p_ref / (1 - p_ref))
            assert gain == pytest.approx(
                advantage * float(omega(case["fpr"] + advantage * p, verifiers.WEIGHTS)) / beta, rel=1e-3
            )


def test_speed_is_measured(results):
    assert set(results["per_second"]) >= {"####", r"\boxed", "tag", "last", "####, pool of 2"}
    assert min(results["per_second"].values()) > 10  # 50,000 for ours, on a quiet machine

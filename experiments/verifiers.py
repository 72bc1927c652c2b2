r"""How often the numeric verifiers err, how fast they are, and what an error rate does to where training ends.

    python -m experiments.verifiers --data=FOLDER_WITH_GSM8K_TEST.JSONL [--out=runs/verifiers] [--quick]

Every reference solution of GSM8K's test split is written in every format with its right answer in many spellings, which must all
be accepted, and with wrong answers near it, or several answers, which must all be rejected. math-verify stands beside where it
is installed: it reads the same ``####`` text with its defaults, and the same ``\boxed{}`` text in the strict way that is advised
for rewards. The rates then go to the theory of a noisy verifier: Ω(p) = (TPR − FPR)·Ω_G(FPR + (TPR − FPR) p), and p* is where
it leads in many small steps.

A rate is a mean over a choice of spellings, mistakes or hedges, each counted alike, chosen by who made the verifiers; it is not
what some policy writes. A policy trained against a verifier looks for what it wrongly accepts, so that one such row counts more
than any mean. Four minutes with math-verify, on busy cores; a quarter of one without.
"""

import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from absl import app, flags

from experiments.rewritten_answers import HEDGES, MISTAKES, RIGHT, Row, hedge, read, single
from grpo_jax.tasks import Verdict, numeric
from grpo_jax.tasks.workers import VerifierPool
from grpo_jax.theory import Group, NoisyVerifier, flow_point

FORMATS = {
    "####": "\n#### {}",
    r"\boxed": r" $\boxed{{{}}}$.",
    "tag": " <answer>{}</answer>",
    "last": " The answer is {}.",
}
VERIFIERS = {
    "####": numeric.verify_hash,
    r"\boxed": numeric.verify_boxed,
    "tag": numeric.verify_tag,
    "last": numeric.verify_last,
}
PEERS = {"math-verify ####": "####", r"math-verify \boxed": r"\boxed"}  # and the format that it reads
PEER_ROWS = 300  # math-verify takes a thousandth of a second each
WEIGHTS = Group(8, epsilon=1e-4)
P_REFS, BETAS = (0.2, 0.5), (0.1, 1.0)
RATES = {
    "no errors": (0.0, 0.0),
    "1 % false negatives": (0.0, 0.01),
    "1 % false positives": (0.01, 0.0),
    "1 % of both": (0.01, 0.01),
    "5 % false negatives": (0.0, 0.05),
    "5 % false positives": (0.05, 0.0),
    "5 % of both": (0.05, 0.05),
}
"""False positive and false negative rates to compare with."""


def experiment(data: Path, out: Path, *, quick: bool = False) -> None:
    """Prints the tables and writes verifiers.json.

    Args:
      data: folder that holds GSM8K's test.jsonl.
      out: folder of verifiers.json.
      quick: a hundred rows only.
    """
    rows = read(data / "test.jsonl")[: 100 if quick else None]
    judges = _judges()
    results: dict[str, Any] = {
        "right": {name: _accepted(judges, rows, single(rewrite)) for name, rewrite in RIGHT.items()},
        "mistakes": {name: _accepted(judges, rows, single(rewrite)) for name, rewrite in MISTAKES.items()},
        "hedges": {name: _accepted(judges, rows, hedge(parts)) for name, parts in HEDGES.items()},
    }
    rates = {name: {kind: _mean(table, name) for kind, table in results.items()} for name in judges}
    settings = list(itertools.product(P_REFS, BETAS))
    cases = [(name, fpr, fnr, [q_star(*setting, fpr, fnr) for setting in settings]) for name, fpr, fnr in _cases(rates)]
    speed = {name: _speed(judge, name, rows) for name, judge in judges.items()}
    speed |= {f"{name}, pool of 2": _pool_speed(name, rows) for name in ("####", r"\boxed")}
    print(f"{len(rows)} solutions; math-verify on {PEER_ROWS} at most\n\nright answers rejected, %\n")
    print(_counts_table(judges, results["right"], accepted=False))
    print(f"\nwrong answers accepted, %\n\n{_counts_table(judges, results['mistakes'], accepted=True)}")
    print(f"\nseveral answers, or none, accepted, %\n\n{_counts_table(judges, results['hedges'], accepted=True)}")
    print(f"\np*, or 1 − what is missing; groups of {WEIGHTS.size}, many small steps\n\n{_ends_table(settings, cases)}")
    print(f"\nper second\n\n{_table(['verifier', 'verifications'], [[k, f'{n:,.0f}'] for k, n in speed.items()])}")
    ends = [dict(zip(("case", "fpr", "fnr", "q_star"), case, strict=True)) for case in cases]
    results |= {"rows": len(rows), "settings (p_ref, beta)": settings, "ends": ends, "per_second": speed}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "verifiers.json").write_text(text + "\n", encoding="utf-8")


def _judges() -> dict[str, Callable[[str, str], bool]]:
    """By name, whether a completion is accepted."""

    def ours(verify: Callable[[str, str, bool], Verdict]) -> Callable[[str, str], bool]:
        return lambda completion, target: verify(completion, target, False) is Verdict.correct

    judges = {name: ours(verify) for name, verify in VERIFIERS.items()}
    if importlib.util.find_spec("math_verify") is None:
        return judges
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    box = LatexExtractionConfig(
        boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=NormalizationConfig(units=True)
    )
    strict: dict[str, Any] = {
        "extraction_config": [box],
        "fallback_mode": "no_fallback",
        "extraction_mode": "first_match",
    }

    def theirs(options: dict[str, Any]) -> Callable[[str, str], bool]:
        return lambda completion, target: bool(verify(parse(f"${target}$"), parse(completion, **options)))

    return judges | {name: theirs(strict if form == r"\boxed" else {}) for name, form in PEERS.items()}


def _accepted(
    judges: dict[str, Callable[[str, str], bool]], rows: list[Row], rewrite: Callable[[Row, str], str | None]
) -> dict[str, dict[str, int]]:
    """Per judge, how many of the rewritten solutions it accepts, of how many."""
    counts = {}
    for name, judge in judges.items():
        few = rows[: PEER_ROWS if name in PEERS else None]
        completions = [(rewrite(row, FORMATS[PEERS.get(name, name)]), str(row.answer)) for row in few]
        verdicts = [judge(completion, target) for completion, target in completions if completion is not None]
        counts[name] = {"accepted": sum(verdicts), "of": len(verdicts)}
    return counts


def _mean(counts: dict[str, dict[str, dict[str, int]]], name: str) -> float:
    """The share that a judge accepts, every row of the table counted alike."""
    return fmean(row[name]["accepted"] / row[name]["of"] for row in counts.values() if row[name]["of"])


def _cases(rates: dict[str, dict[str, float]]) -> list[tuple[str, float, float]]:
    """Names with false positive and false negative rates; of the judges, for a policy that errs and for one that hedges."""
    cases = [(name, *both) for name, both in RATES.items()]
    for name, rate in rates.items():
        cases += [(f"{name}, {kind}", rate[kind], 1 - rate["right"]) for kind in ("mistakes", "hedges")]
    return cases


def q_star(p_ref: float, beta: float, fpr: float, fnr: float) -> float:
    """1 − p*, where many small steps from p_ref end with such a verifier; all of 1 − p_ref where it is no better than chance.

    >>> [round(q_star(0.2, 1.0, fpr, 0.0), 4) for fpr in (0.0, 0.05)]
    [0.3753, 0.3982]
    """
    with jax.enable_x64(True):
        weights = NoisyVerifier(WEIGHTS, tpr=1 - fnr, fpr=fpr)
        logit = flow_point(math.log(p_ref / (1 - p_ref)), beta=beta, weights=weights, logits=True)
        return float(jax.nn.sigmoid(-logit))


def _speed(judge: Callable[[str, str], bool], name: str, rows: list[Row]) -> float:
    """Verifications per second of one core, by its own processor time, the best of five rounds."""
    form = FORMATS[PEERS.get(name, name)]
    pairs = [(row.text + form.format(row.answer), str(row.answer)) for row in rows]
    pairs = pairs[:100] if name in PEERS else pairs
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for completion, target in pairs:
            judge(completion, target)
        best = min(best, time.process_time() - start)
    return len(pairs) / best


def _pool_speed(name: str, rows: list[Row]) -> float:
    """Verifications per second of wall time through two worker processes, once they run."""
    completions = [row.text + FORMATS[name].format(row.answer) for row in rows] * 8
    targets = [str(row.answer) for row in rows] * 8
    with VerifierPool(VERIFIERS[name], num_workers=2, deadline=60.0) as pool:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            verdicts = pool.verify(completions, targets, [False] * len(completions))
            seconds.append(time.perf_counter() - start)
    assert set(verdicts) == {Verdict.correct}
    return len(completions) / min(seconds)


def _counts_table(judges: dict[str, Any], counts: dict[str, Any], *, accepted: bool) -> str:
    rows = []
    for label, row in counts.items():
        cells = [(cell["accepted"] if accepted else cell["of"] - cell["accepted"], cell["of"]) for cell in row.values()]
        shares = [f"{100 * count / of:.3g}" if of else "–" for count, of in cells]
        rows.append([label, str(max(of for _, of in cells)), *shares])
    return _table(["answer", "n", *judges], rows)


def _ends_table(settings: list[tuple[float, float]], cases: list[tuple[str, float, float, list[float]]]) -> str:
    heads = ["verifier", "FPR, %", "FNR, %", *(f"p_ref {p_ref:g}, β {beta:g}" for p_ref, beta in settings)]
    rows = []
    for name, fpr, fnr, missing in cases:
        shown = [f"{1 - q:.4f}" if q > 1e-3 else f"1 − {q:.1e}" for q in missing]
        rows.append([name, f"{100 * fpr:.3g}", f"{100 * fnr:.3g}", *shown])
    return _table(heads, rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def main(arguments: list[str]) -> None:
    """The command line."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    experiment(Path(flags.FLAGS.data), Path(flags.FLAGS.out), quick=flags.FLAGS.quick)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder that holds GSM8K's test.jsonl.", required=True)
    flags.DEFINE_string("out", "runs/verifiers", "Where verifiers.json goes.")
    flags.DEFINE_bool("quick", False, "A hundred rows only.")
    app.run(main)

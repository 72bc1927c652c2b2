"""Fails where a ratio to another form has become more than 20 % worse than that of baseline.json.

python -m experiments.benchmarks.check [--quick] [--write] [--works=sampling,update,iteration]

A ratio is the other form's median time over ours, in one run, so that a slower machine changes nothing. A case whose ratio is
worse is measured again, up to `ATTEMPTS` times: what is noise passes once, what is a regression does not. Forms that are not
here are left out, as is what the baseline does not name. ``--write`` writes what was measured as the baseline.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from experiments.benchmarks import cases, race
from experiments.benchmarks.cases import Case

BASELINE = Path(__file__).with_name("baseline.json")
WORSE = 1.2
ATTEMPTS = 3
Ratios = dict[str, float]


def regressions(
    baseline: dict[str, Ratios], measure: Callable[[str], Ratios], attempts: int = ATTEMPTS
) -> dict[str, dict[str, tuple[float, float]]]:
    """Of every case, the forms whose ratio is worse in each attempt: {form: (baseline, the best of the attempts)}.

    Args:
      baseline: the ratios of each case, by the name of the case.
      measure: from the name of a case to its ratios now.
      attempts: how often a case is measured at most.

    >>> regressions({"update fixed 1024": {"plain": 1.5, "TRL": 2.0}}, lambda case: {"plain": 1.2, "TRL": 1.9})
    {'update fixed 1024': {'plain': (1.5, 1.2)}}
    """
    worse_cases = {}
    for case, expected in baseline.items():
        best: Ratios = {}
        worse: Ratios = {}
        for _ in range(attempts):
            now = measure(case)
            best = {form: max(now[form], best.get(form, 0.0)) for form in now if form in expected}
            worse = {form: ratio for form, ratio in best.items() if ratio * WORSE < expected[form]}
            if not worse:
                break
        if worse:
            worse_cases[case] = {form: (expected[form], ratio) for form, ratio in worse.items()}
    return worse_cases


def main(arguments: list[str]) -> None:
    """Exits with 1 and a line for each regression, where there are any."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    options = flags.FLAGS
    size = "quick" if options.quick else "full"
    runners = race.forms(os.environ)
    chosen = [Case(work, v, ragged) for work in options.works for v in (1024, 32000) for ragged in (False, True)]
    by_name = {case.name: case for case in chosen}

    def measure(name: str) -> Ratios:
        case = cases.quick(by_name[name]) if options.quick else by_name[name]
        rows = race.race(case, runners, 9 if options.quick else 7)
        print(f"{name}\n\n{race.table(rows)}", flush=True)
        return {form: round(ratio, 3) for form, ratio in race.ratios(rows).items() if form != "ours"}

    baseline = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    if options.write:
        for name in by_name:
            baseline.setdefault(size, {})[name] = measure(name)
            BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    expected = {name: ratios for name, ratios in baseline.get(size, {}).items() if name in by_name}
    if not expected:
        raise SystemExit(f"{BASELINE.name} has nothing of these for size {size!r}: run with --write first")
    lines = [
        f"{case}: {form} takes {now:.2f} × our time, and took {before:.2f} × in the baseline"
        for case, forms in regressions(expected, measure).items()
        for form, (before, now) in forms.items()
    ]
    if lines:
        raise SystemExit("\n".join(lines))
    print(f"no ratio is more than {100 * (WORSE - 1):.0f} % worse than its baseline")


if __name__ == "__main__":
    flags.DEFINE_bool("quick", False, "Small shapes.")
    flags.DEFINE_bool("write", False, "Write the baseline instead of checking.")
    flags.DEFINE_list("works", list(cases.WORKS), "What to measure.")
    race.among("works", cases.WORKS)
    app.run(main)

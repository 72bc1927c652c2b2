"""The theory on the command line: python -m grpo_jax.theory plan | explain (--help has examples). Needs jax alone.

Exit codes: 0 done, 2 bad command line or input, with one line on stderr that says what.
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from grpo_jax.environment import prepare_environment, prepare_streams
from grpo_jax.objective import NAMED, Objective, named_objective
from grpo_jax.theory.explanation import explain
from grpo_jax.theory.planning import (
    BetaRange,
    CurvePoint,
    PlanRow,
    TargetBeta,
    beta_for_mean,
    curve,
    plan,
    recommended_range,
)
from grpo_jax.theory.weights import Group

GROUP_SIZE, OBJECTIVE, CONFIDENCE = 8, "GRPO", 0.95  # where no run directory says otherwise
PROMPTS = "prompts.jsonl"  # of an evaluation
MOST = 2**53  # counts beyond which floats have gaps
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
EXAMPLES = """examples:
  python -m grpo_jax.theory plan --p_ref=0.01,0.2,0.5 --trials=100 --beta=0.3,1,3
  python -m grpo_jax.theory plan --from=runs/small --beta=0.3,1,3 --figure=plan.png --json=plan.json
  python -m grpo_jax.theory plan --from=counts.jsonl --group_size=16 --objective=GRPO_TRL --target=0.8
  python -m grpo_jax.theory explain --p_ref=0.01 --beta=1 --group_size=8

counts.jsonl has one prompt per line: {"successes": 3, "trials": 100}"""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line."""


class Inputs(NamedTuple):
    """What was measured and what would be trained. trials is None where successes are probabilities taken as exact."""

    successes: Sequence[float]
    trials: Sequence[int] | None
    group_size: int
    name: str
    objective: Objective
    confidence: float


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        lines = _plan(options) if options.command == "plan" else _explain(options)
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"grpo_jax.theory: {' '.join(text.split())}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="python -m grpo_jax.theory", description=__doc__, epilog=EXAMPLES, **shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan | explain")
    for name, text in (
        ("plan", "What each β would do to prompts with measured success, and which βs are worth sweeping."),
        ("explain", "In words, what one β would do to one prompt, and why."),
    ):
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, **shape)
        command.add_argument("--p_ref", help="success probabilities of the reference policy, such as 0.01,0.2,0.5")
        command.add_argument("--beta", help="weights of the KL term, such as 0.3,1,3")
        command.add_argument("--group_size", help=f"G; default: that of --from's run or evaluation, else {GROUP_SIZE}")
        command.add_argument("--objective", help=f"{', '.join(NAMED)}; default: that of --from's run, else {OBJECTIVE}")
        if name == "plan":
            command.add_argument("--trials", help="samples per prompt behind --p_ref; without, p_ref is taken as exact")
            command.add_argument(
                "--from", dest="path", help="a run directory, an evaluation's, or a JSONL file of successes and trials"
            )
            command.add_argument("--target", help="instead of --beta: the mean success probability wanted")
            command.add_argument("--confidence", help=f"of the intervals; default: the run's, else {CONFIDENCE}")
            command.add_argument("--figure", help="PNG to write: p* over β (needs matplotlib)")
            command.add_argument("--json", help="file to write the numbers to")
    return parser


def _plan(options: argparse.Namespace) -> list[str]:
    if (options.beta is None) == (options.target is None):
        raise InputError("give either --beta or --target" + ("" if options.beta is None else ", not both"))
    if options.figure is not None and find_spec("matplotlib") is None:
        raise InputError("--figure needs matplotlib: pip install matplotlib")
    inputs = _inputs(options)
    kl = inputs.objective.kl_direction
    what: dict[str, Any] = {"weights": Group(inputs.group_size, **inputs.objective.normaliser()), "kl": kl}
    measured = inputs.successes, inputs.trials
    aim = None
    if options.target is None:
        betas = _betas(options.beta)
    else:
        aim = beta_for_mean(_number("--target", options.target), *measured, **what)
        betas = [aim.beta]
    rows = plan(*measured, betas, confidence=inputs.confidence, **what)
    sweep = recommended_range(*measured, **what)
    lines = [*_heading(inputs, rows[0]), "", *_table(rows), "", *_legend(rows[0]), *_aim_lines(aim, options.target)]
    lines += _range_lines(sweep, rows[0], kl)
    if options.json is not None:
        _write_json(options.json, inputs, rows, sweep, aim)
    if options.figure is not None:
        ends = [*betas, *([sweep.low.beta, sweep.high.beta] if sweep else [])]
        first, last = math.log(min(ends) / 2), math.log(max(ends) * 2)
        grid = [math.exp(first + (last - first) * i / 120) for i in range(121)]
        points = curve(*measured, grid, quantiles=QUANTILES, confidence=inputs.confidence, **what)
        _draw(options.figure, points, rows, sweep, f"{inputs.name}, G = {inputs.group_size}")
    return lines


def _explain(options: argparse.Namespace) -> list[str]:
    for name in ("p_ref", "beta"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing")
    objective, _ = _objective(options.objective, {})
    weights = Group(_group_size(options.group_size or GROUP_SIZE), **objective.normaliser())
    betas, references = _betas(options.beta), [float(p) for p in _probabilities(options.p_ref)]
    texts = [explain(p, beta=beta, weights=weights, kl=objective.kl_direction) for p in references for beta in betas]
    lines = "\n\n".join(texts).split("\n")
    return ["\n".join(textwrap.wrap(line, 110, subsequent_indent=" " * 11, break_on_hyphens=False)) for line in lines]


def _inputs(options: argparse.Namespace) -> Inputs:
    if (options.p_ref is None) == (options.path is None):
        raise InputError("give either --p_ref or --from" + ("" if options.p_ref is None else ", not both"))
    config: dict[str, Any] = {}
    successes: Sequence[float]
    trials: Sequence[int] | None = None
    if options.p_ref is not None:
        values = _probabilities(options.p_ref)
        successes = [float(value) for value in values]
        if options.trials is not None:
            count = _count("--trials", options.trials, 1)
            successes, trials = [_successes(value, count) for value in values], [count] * len(values)
    else:
        if options.trials is not None:
            raise InputError("--trials goes with --p_ref; what --from reads has its own")
        path = Path(options.path)
        if path.is_dir():
            counts = _counts(path)
            config = _object(path / "config.json")
            successes, trials = _rows(counts) if counts.name == PROMPTS else _reference(counts)
        else:
            successes, trials = _rows(path)
    try:
        objective, name = _objective(options.objective, config)
    except (TypeError, ValueError) as error:
        raise InputError(
            str(error) if options.objective or not config else f"{options.path}/config.json: {error}"
        ) from None
    if not options.objective and config.get("objective.entropy_bonus"):
        raise InputError(
            f"{options.path}: an entropy bonus moves the end to where the theory does not know; without: --objective"
        )
    group_size = _group_size(options.group_size or config.get("rollout.group_size", GROUP_SIZE))
    confidence = _number("--confidence", options.confidence or str(config.get("evaluate.confidence", CONFIDENCE)))
    if not 0 < confidence < 1:
        raise InputError(f"--confidence={confidence:g} must be inside (0, 1)")
    return Inputs(successes, trials, group_size, name, objective, confidence)


def _objective(name: str | None, config: dict[str, Any]) -> tuple[Objective, str]:
    """The objective asked for; else the run's, with the choices that its config sets."""
    choices: dict[str, Any] = {}
    if name is None and "objective.name" in config:
        name = str(config["objective.name"])
        choices = {field.name: config.get(f"objective.{field.name}") for field in fields(Objective)}
    objective = named_objective(name or OBJECTIVE, **choices)
    if not objective.is_predicted:
        raise InputError(f"{name}: {objective.fixed_point}")
    if objective.anchor != "reference":
        end = "1; theory.mirror_steps knows the pace" if objective.anchor == "previous" else "GRPO's at the same β"
        raise InputError(f"{name} holds to the previous policy, which sets the pace of iterations; its p* is {end}")
    return objective, name or OBJECTIVE


def _counts(directory: Path) -> Path:
    """The file with the counts of a run, or of an evaluation."""
    for name in ("reference.json", PROMPTS):
        if (directory / name).exists():
            return directory / name
    evaluations = [str(path.parent) for path in sorted(directory.glob(f"evaluations/*/{PROMPTS}"))]
    reason = (
        f"but evaluations: give --from={' or --from='.join(evaluations)}"
        if evaluations
        else "and no finished evaluation (prompts.jsonl)"
    )
    raise InputError(f"{directory} holds no measured reference (reference.json), {reason}")


def _reference(path: Path) -> tuple[list[int], list[int]]:
    found = _object(path)
    successes, trials = found.get("successes"), found.get("trials")
    if not isinstance(successes, list) or not successes:
        raise InputError(f'{path}: "successes" must be a list of counts')
    return (
        [_pair({"successes": k, "trials": trials}, f"{path}: prompt {i}")[0] for i, k in enumerate(successes)],
        [_count(f"{path}: trials", trials, 1)] * len(successes),
    )


def _rows(path: Path) -> tuple[list[int], list[int]]:
    pairs = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if line.strip():
                pairs.append(_pair(_parsed(line, where), where))
    if not pairs:
        raise InputError(f"{path}: no rows")
    return [k for k, _ in pairs], [n for _, n in pairs]


def _object(path: Path) -> dict[str, Any]:
    found = _parsed(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error) or 'nested too deeply'})") from None


def _pair(row: Any, where: str) -> tuple[int, int]:
    if not isinstance(row, dict) or not {"successes", "trials"} <= set(row):
        raise InputError(f'{where}: not a JSON object with "successes" and "trials"')
    successes, trials = _count(f"{where}: successes", row["successes"], 0), _count(f"{where}: trials", row["trials"], 1)
    if successes > trials:
        raise InputError(f"{where}: successes={successes} exceed trials={trials}")
    return successes, trials


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise InputError(f"{name}={value[:40]!r} is not a whole number") from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name}={str(value)[:40]} is not a whole number")
    if not least <= value < MOST:
        raise InputError(f"{name} must be at least {least} and below 2**53")
    return value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name}={text!r} is not a number") from None


def _group_size(value: Any) -> int:
    size = _count("group_size", value, 2)
    if size > 1024:
        raise InputError(f"group_size={size} is more than 1024")
    return size


def _betas(text: str) -> list[float]:
    betas = [_number("--beta", part) for part in text.split(",")]
    for beta in betas:
        if not 0 < beta < math.inf:
            raise InputError(f"--beta={beta:g} must be positive and finite")
    return betas


def _probabilities(text: str) -> list[Decimal]:
    """As they were typed, because the digits say how far they were rounded."""
    values = []
    for part in text.split(","):
        try:
            value = Decimal(part)
        except InvalidOperation:
            raise InputError(f"--p_ref={part!r} is not a number") from None
        if not (value.is_finite() and 0 <= value <= 1):
            raise InputError(f"--p_ref={part} is not a probability in [0, 1]")
        values.append(value)
    return values


def _successes(p: Decimal, trials: int) -> int:
    """The count that p is a rounding of."""
    count = round(p * trials)
    digits = p.as_tuple().exponent
    if abs(p - Decimal(count) / trials) > Decimal(1).scaleb(int(digits)) / 2:
        raise InputError(f"--p_ref={p} is no number of successes in --trials={trials}; nearest is {count}/{trials}")
    return count


def _heading(inputs: Inputs, row: PlanRow) -> list[str]:
    trials = "taken as exact"
    if inputs.trials is not None:
        low, high = min(inputs.trials), max(inputs.trials)
        trials = f"{low if low == high else f'{low} to {high}'} trials each"
    many = f"{len(inputs.successes)} prompt{'s' if len(inputs.successes) > 1 else ''}"
    return [
        f"objective     {inputs.name}, groups of {inputs.group_size}",
        f"fixed point   {inputs.objective.fixed_point}",
        f"measured      {many}, {trials}: p_ref = {_band(row.p_ref, row.p_ref_low, row.p_ref_high)}"
        + (f" ({inputs.confidence:.4g} intervals)" if inputs.trials is not None else ""),
        f"KL budget     {row.kl_budget:.4g} nats per completion, the mean of ln(1/p_ref) where any success was seen",
        f"dead groups   {row.dead_groups_start:.1%} at p_ref; {row.dead:.1%} of prompts hardly ever see a success",
    ]


def _table(rows: list[PlanRow]) -> list[str]:
    head = [
        "β",
        "p*",
        "saturate",
        "stay dead",
        "oscillate",
        "on a fold",
        "KL",
        "dead groups",
        "exact: iterations",
        "→ p",
    ]
    head += ["mirror: steps", "KL/step"]
    cells = [
        [
            f"{row.beta:.4g}",
            _band(row.p_star, row.p_star_low, row.p_star_high),
            *(f"{share:.1%}" for share in (row.saturates, row.dead, row.oscillates, row.folds)),
            f"{row.kl:.3g}",
            f"{row.dead_groups:.1%}",
            "never" if row.iterations is None else str(row.iterations),
            f"{row.p_exact:.3f}",
            "-" if row.mirror_steps is None else f"{row.mirror_steps:.3g}" if row.mirror_steps >= 1 else "< 1",
            "-" if row.mirror_step_kl is None else f"{row.mirror_step_kl:.3g}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *cells]]


def _legend(row: PlanRow) -> list[str]:
    lines = [
        "columns       saturate: p* > 0.99 · oscillate and exact: were each iteration solved exactly · on a fold: p* jumps",
        "              within the interval of p_ref · mirror: small steps of mirror GRPO to 95 % of the gain",
    ]
    if row.dead:
        lines.append(
            f"stay dead     {row.dead:.1%} see no success in over 99 % of groups: what p* says of them may take for ever"
        )
    return lines


def _band(mean: float, low: float, high: float) -> str:
    return _share(mean) if low == high else f"{_share(mean)} [{_share(low)}, {_share(high)}]"


def _share(p: float) -> str:
    """A probability to four places, or two digits where those would be zeros."""
    return f"{p:.4f}" if p >= 0.001 or p == 0 else f"{p:.2g}"


def _aim_lines(aim: TargetBeta | None, target: str | None) -> list[str]:
    if aim is None:
        return []
    if aim.jumps_to is None:
        return [f"target        β = {aim.beta:.6g} leads to p* = {aim.p_star:.4f}."]
    return [
        f"target        no β leads to p* = {target}: a fold jumps over it. β = {aim.beta:.6g} leads to {aim.p_star:.4f}, and",
        f"              any smaller β to {min(aim.jumps_to, 0.9999):.4f} or more.",
    ]


def _range_lines(sweep: BetaRange | None, row: PlanRow, kl: str) -> list[str]:
    if kl == "none":
        return ["sweep         nothing: without a KL term no β changes anything."]
    if sweep is None:
        return ["sweep         nothing: no β moves prompts that always or never succeed."]
    lines = [
        f"sweep         β from {sweep.low.beta:.3g} to {sweep.high.beta:.3g}: there p* goes from {sweep.low.p_star:.3f} to "
        f"{sweep.high.p_star:.3f}, 90 % and 10 % of what β can",
        f"              gain over p_ref = {row.p_ref:.3f}. Below, prompts saturate; above, the reference holds them.",
    ]
    for end in sweep:
        if end.jumps_to is not None and end.jumps_to - end.p_star > 5e-4:
            lines.append(
                f"              At β = {end.beta:.3g} a fold makes p* jump from {end.p_star:.3f} to {end.jumps_to:.3f}."
            )
    return lines


def _write_json(
    path: str, inputs: Inputs, rows: list[PlanRow], sweep: BetaRange | None, aim: TargetBeta | None
) -> None:
    value = {
        "objective": inputs.name,
        "group_size": inputs.group_size,
        "prompts": len(inputs.successes),
        "confidence": inputs.confidence,
        "rows": [row._asdict() for row in rows],
        "recommended": sweep and {name: end._asdict() for name, end in sweep._asdict().items()},
        "target": aim and aim._asdict(),
    }
    Path(path).write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _draw(path: str, points: Sequence[CurvePoint], rows: list[PlanRow], sweep: BetaRange | None, title: str) -> None:
    """Writes a PNG: p* over β, its mean with the interval, pairs of quantiles, and the recommended range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    betas = [point.beta for point in points]
    if sweep is not None:
        axes.axvspan(sweep.low.beta, sweep.high.beta, color="0.9", linewidth=0, label="recommended range")
    low, high = [point.p_star_low for point in points], [point.p_star_high for point in points]
    axes.fill_between(betas, low, high, color="#d55e00", alpha=0.3, linewidth=0)
    axes.plot(betas, [point.p_star for point in points], color="#d55e00", linewidth=2.2, label="mean, with interval")
    labels = {0.9: "90 % and 10 % quantile", 0.75: "75 % and 25 % quantile", 0.5: "median prompt"}
    for i, q in enumerate(QUANTILES):
        style = {0.0: "--", 0.25: "-.", 0.4: ":"}[round(abs(q - 0.5), 2)]
        values = [point.quantiles[i] for point in points]
        axes.plot(betas, values, color="#0072b2", linewidth=1.2, linestyle=style, label=labels.get(q))
    errors = [[r.p_star - r.p_star_low for r in rows], [r.p_star_high - r.p_star for r in rows]]
    axes.errorbar([r.beta for r in rows], [r.p_star for r in rows], errors, fmt="o", color="#222222", label="planned β")
    axes.axhline(rows[0].p_ref, color="#222222", linewidth=0.8)
    axes.text(betas[-1], rows[0].p_ref - 0.015, "mean p_ref ", ha="right", va="top", color="#222222", fontsize=9)
    axes.set(xscale="log", xlabel="β", ylabel="predicted success probability p*", ylim=(-0.02, 1.02), title=title)
    axes.set_xlim(betas[0], betas[-1])
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    axes.set_xticks(shown := [x for x in ticks if betas[0] <= x <= betas[-1]], [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    prepare_streams()
    prepare_environment()
    sys.exit(main(sys.argv[1:]))

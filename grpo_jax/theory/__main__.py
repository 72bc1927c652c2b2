"""The theory on the command line: python -m grpo_jax.theory plan | explain (--help has examples). Needs jax alone.

Exit codes: 0 done, 2 bad command line or input, with one line on stderr that says what.
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from grpo_jax.environment import prepare_environment, prepare_streams
from grpo_jax.objective import NAMED, Objective, named_objective
from grpo_jax.storage import named
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
from grpo_jax.theory.posteriors import Mean
from grpo_jax.theory.weights import Group

GROUP_SIZE, OBJECTIVE, CONFIDENCE = 8, "GRPO", 0.95  # where no run directory says otherwise
PROMPTS = "prompts.jsonl"  # of an evaluation
ATTAINABLE = "attainable.json"  # of a run: what its network lets through
COUNT_LIMIT = 2**53  # floats are not exact for whole numbers beyond it
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # of the flags that take numbers
    "--p_ref": (lambda p: 0 <= p <= 1, "is not a probability in [0, 1]"),
    "--beta": (lambda beta: 0 < beta < math.inf, "must be positive and finite"),
    "--target": (lambda p: 0 < p < 1, "must be inside (0, 1)"),
    "--confidence": (lambda share: 0 < share < 1, "must be inside (0, 1)"),
    "--speed": (lambda speed: 0 < speed < math.inf, "must be positive and finite"),
}
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
EXAMPLES = """examples:
  python -m grpo_jax.theory plan --p_ref=0.01,0.2,0.5 --trials=100 --beta=0.3,1,3
  python -m grpo_jax.theory plan --from=runs/small --beta=0.3,1,3 --figure=plan.png --json=plan.json
  python -m grpo_jax.theory plan --from=counts.jsonl --group_size=16 --objective=GRPO_TRL --target=0.8
  python -m grpo_jax.theory explain --p_ref=0.01 --beta=1 --group_size=8

counts.jsonl has one prompt per line: {"successes": 3, "trials": 100}"""


class InputError(Exception):
    """Something the user typed, or a file it names, cannot be used; the message is one line.

    Not a ValueError, because argparse replaces the message of a ValueError by its own.
    """


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        lines = options.run(options)
    except (InputError, ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"grpo_jax.theory: {' '.join(text.split())}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    flags: list[tuple[str, Callable[[str, str], Any] | None, str]] = [
        ("--p_ref", _numbers, "success probabilities of the reference policy, such as 0.01,0.2,0.5"),
        ("--beta", _numbers, "weights of the KL term, such as 0.3,1,3"),
        ("--group_size", _group_size, f"G; default: that of --from's run or evaluation, else {GROUP_SIZE}"),
        ("--objective", None, f"{', '.join(NAMED)}; default: that of --from's run, else {OBJECTIVE}"),
    ]
    plan_flags = [
        *flags,
        ("--trials", _count, "samples per prompt behind --p_ref; without, p_ref is taken as exact"),
        ("--from", None, "a run directory, an evaluation's, or a JSONL file of successes and trials"),
        ("--target", _number, "instead of --beta: the mean success probability wanted"),
        ("--confidence", _number, f"of the intervals; default: the run's, else {CONFIDENCE}"),
        ("--speed", _number, "κ per iteration at the peak learning rate; default: the run's, where it was measured"),
        ("--figure", None, "PNG to write: p* over β (needs matplotlib)"),
        ("--json", None, "file to write the numbers to"),
    ]
    plan_text = "What each β would do to prompts with measured success, and which βs are worth sweeping."
    explain_text = "In words, what one β would do to one prompt, and why."
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog="python -m grpo_jax.theory", description=__doc__, epilog=EXAMPLES, **shape)
    commands = parser.add_subparsers(required=True, metavar="plan | explain")
    for name, run, text, its_flags in (
        ("plan", _plan, plan_text, plan_flags),
        ("explain", _explain, explain_text, flags),
    ):
        command = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, **shape)
        command.set_defaults(run=run)
        for flag, kind, meaning in its_flags:
            command.add_argument(flag, type=partial(kind, flag) if kind else str, help=meaning)
    return parser


def _plan(options: argparse.Namespace) -> list[str]:
    # The flags must go together.
    _check_exactly_one(options, "beta", "target")
    if options.figure is not None and find_spec("matplotlib") is None:
        raise InputError("--figure needs matplotlib: pip install matplotlib")
    _check_exactly_one(options, "p_ref", "from")
    # What was measured: typed, or read together with the config of its run.
    given: str | None = getattr(options, "from")
    source = None if given is None else named(given)
    config: dict[str, Any] = {}
    if source is None:
        successes, trials = _typed_counts(options.p_ref, options.trials)
    elif options.trials is None:
        successes, trials, config = _read_counts(source)
    else:
        raise InputError("--trials goes with --p_ref; what --from reads has its own")
    # What would be trained: by the flags, else by that config, else by the defaults.
    name, objective = _objective(options.objective, config, f"{source}/config.json: ")
    group_size = options.group_size or _group_size("group_size", config.get("rollout.group_size", GROUP_SIZE))
    confidence = float(options.confidence or _number("--confidence", config.get("evaluate.confidence", CONFIDENCE)))
    kl = objective.kl_direction
    settings: dict[str, Any] = {"weights": Group(group_size, **objective.normaliser()), "kl": kl}
    # What the theory says of it.
    target = None if options.target is None else beta_for_mean(float(options.target), successes, trials, **settings)
    betas = [target.beta] if target else [float(beta) for beta in options.beta]
    speed = _run_speed(source) if options.speed is None and source else options.speed
    speed = None if speed is None else float(speed)
    # R² weighs the prompts by the pull of what was measured: another objective or group size has another.
    is_same = options.objective is None and group_size == config.get("rollout.group_size")
    r2 = _run_r2(source) if source and kl == "reverse" and is_same else None
    plans = plan(successes, trials, betas, confidence=confidence, speed=speed, r2=r2, **settings)
    sweep = recommended_range(successes, trials, **settings)
    # The files.
    if options.json is not None:
        numbers = {
            "objective": name,
            "group_size": group_size,
            "prompts": len(successes),
            "confidence": confidence,
            "speed": speed,
            "r2": r2 and r2._asdict(),
            "rows": [row._asdict() | {"attainable": row.attainable and row.attainable._asdict()} for row in plans],
            "recommended": sweep and {end: beta._asdict() for end, beta in sweep._asdict().items()},
            "target": target and target._asdict(),
        }
        Path(options.json).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.figure is not None:
        ends = [*betas, *([sweep.low.beta, sweep.high.beta] if sweep else [])]
        first, last = math.log(min(ends) / 2), math.log(max(ends) * 2)
        grid = [math.exp(first + (last - first) * i / 120) for i in range(121)]
        points = curve(successes, trials, grid, quantiles=QUANTILES, confidence=confidence, **settings)
        _plot(options.figure, points, plans, sweep, f"{name}, G = {group_size}")
    # The text.
    return [
        f"objective     {name}, groups of {group_size}",
        f"fixed point   {objective.fixed_point}",
        *_measured_lines(plans[0], len(successes), trials, confidence),
        "",
        *_table(plans, speed),
        "",
        *_legend(plans[0], speed, r2),
        *(_target_lines(target, options.target) if target else ()),
        *_sweep_lines(sweep, plans[0], kl),
    ]


def _explain(options: argparse.Namespace) -> list[str]:
    for name in ("p_ref", "beta"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing")
    _, objective = _objective(options.objective, {})
    weights = Group(options.group_size or GROUP_SIZE, **objective.normaliser())
    cases = [(float(p_ref), float(beta)) for p_ref in options.p_ref for beta in options.beta]
    texts = [explain(p_ref, beta=beta, weights=weights, kl=objective.kl_direction) for p_ref, beta in cases]
    lines = "\n\n".join(texts).split("\n")
    return ["\n".join(textwrap.wrap(line, 110, subsequent_indent=" " * 11, break_on_hyphens=False)) for line in lines]


def _check_exactly_one(options: argparse.Namespace, first: str, second: str) -> None:
    absent = [getattr(options, first), getattr(options, second)].count(None)
    if absent != 1:
        raise InputError(f"give either --{first} or --{second}" + ("" if absent else ", not both"))


def _objective(asked: str | None, config: dict[str, Any], where: str = "") -> tuple[str, Objective]:
    """The objective asked for; else the run's, with the choices that its config sets; else the default."""
    name, choices = asked or OBJECTIVE, {}
    if asked is None and "objective.name" in config:
        name = str(config["objective.name"])
        choices = {field.name: config.get(f"objective.{field.name}") for field in fields(Objective)}
        if config.get("objective.entropy_bonus"):
            reason = "an entropy bonus moves the end to where the theory does not know; without: --objective"
            raise InputError(f"{where}{reason}")
    else:
        where = ""
    try:
        objective = named_objective(name, **choices)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}{error}") from None
    if not objective.is_predicted:
        raise InputError(f"{where}{name}: {objective.fixed_point}")
    if objective.anchor != "reference":
        end = "1; theory.mirror_steps knows the pace" if objective.anchor == "previous" else "GRPO's at the same β"
        reason = f"holds to the previous policy, which sets the pace of iterations; its p* is {end}"
        raise InputError(f"{where}{name} {reason}")
    return name, objective


def _typed_counts(p_ref: list[Decimal], trials: int | None) -> tuple[Sequence[float], Sequence[int] | None]:
    """The counts that typed probabilities are roundings of; without trials, the probabilities themselves."""
    if trials is None:
        return [float(p) for p in p_ref], None
    counts = [round(p * trials) for p in p_ref]
    for p, count in zip(p_ref, counts, strict=True):
        digits = int(p.as_tuple().exponent)
        if abs(p - Decimal(count) / trials) > Decimal(1).scaleb(digits) / 2:
            nearest = f"{count}/{trials}"
            raise InputError(f"--p_ref={p} is no number of successes in --trials={trials}; nearest is {nearest}")
    return counts, [trials] * len(counts)


def _read_counts(path: Path) -> tuple[Sequence[int], Sequence[int], dict[str, Any]]:
    """Successes and trials of each prompt of a run, an evaluation or a JSONL file, and the config of the first two."""
    config: dict[str, Any] = {}
    reference, prompts = path / "reference.json", path / PROMPTS if path.is_dir() else path
    if path.is_dir():
        if not reference.exists() and not prompts.exists():
            evaluations = [f"--from={file.parent}" for file in sorted(path.glob(f"evaluations/*/{PROMPTS}"))]
            others = f"but evaluations: give {' or '.join(evaluations)}"
            none = f"and no finished evaluation ({PROMPTS})"
            raise InputError(f"{path} holds no measured reference (reference.json), {others if evaluations else none}")
        config = _json_object((path / "config.json").read_bytes(), f"{path}/config.json")
    if reference.exists():
        measured = _json_object(reference.read_bytes(), str(reference))
        counts, trials = measured.get("successes"), measured.get("trials")
        if not isinstance(counts, list) or not counts:
            raise InputError(f'{reference}: "successes" must be a list of counts')
        rows = [_row({"successes": k, "trials": trials}, f"{reference}: prompt {i}") for i, k in enumerate(counts)]
    else:
        lines = enumerate(prompts.read_bytes().split(b"\n"), 1)
        places = [(line, f"{prompts}:{number}") for number, line in lines if line.strip()]
        rows = [_row(_json_object(line, where), where) for line, where in places]
        if not rows:
            raise InputError(f"{prompts}: no rows")
    return [successes for successes, _ in rows], [trials for _, trials in rows], config


def _run_speed(path: Path) -> Decimal | None:
    """The κ that a finished run measured; None where there is none."""
    result = path / "result.json"
    if not result.exists():
        return None
    speed: Any = _json_object(result.read_bytes(), str(result)).get("speed")
    try:
        kappa = speed["kappa"]["mean"]
    except (KeyError, TypeError):
        return None
    return None if kappa is None else _number("--speed", kappa)


def _run_r2(path: Path) -> Mean | None:
    """The R² that a run measured of its network; None where there is none, or it was not determined."""
    file = path / ATTAINABLE
    if not file.exists():
        return None
    measured = _json_object(file.read_bytes(), str(file))
    if "r2" not in measured or measured.get("needed"):
        return None
    try:
        r2 = Mean(*(float(measured["r2"][end]) for end in Mean._fields))
    except (KeyError, TypeError, ValueError):
        r2 = None
    if r2 is None or not 0 <= r2.low <= r2.mean <= r2.high <= 1:
        raise InputError(f'{file}: "r2" must be mean, low and high in [0, 1]')
    return r2


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error) or 'nested too deeply'})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


def _row(row: dict[str, Any], where: str) -> tuple[int, int]:
    if not {"successes", "trials"} <= set(row):
        raise InputError(f'{where}: not a JSON object with "successes" and "trials"')
    successes, trials = _count(f"{where}: successes", row["successes"], 0), _count(f"{where}: trials", row["trials"])
    if successes > trials:
        raise InputError(f"{where}: successes={successes} exceed trials={trials}")
    return successes, trials


def _count(name: str, value: Any, least: int = 1) -> int:
    """A whole number, typed or from JSON, where 10.0 is one too."""
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        count = None
    if count is None or isinstance(value, bool) or (isinstance(value, float) and value != count):
        raise InputError(f"{name}={value!r:.40} is not a whole number")
    if not least <= count < COUNT_LIMIT:
        raise InputError(f"{name} must be at least {least} and below 2**53")
    return count


def _group_size(name: str, value: Any) -> int:
    size = _count(name, value, 2)
    if size > 1024:
        raise InputError(f"{name}={size} is more than 1024")
    return size


def _number(flag: str, value: Any) -> Decimal:
    """One number of a flag, checked and as it was typed: the digits of a p_ref say how far it was rounded."""
    is_inside, reason = RANGES[flag]
    try:
        inside = is_inside(float(str(value)))
    except ValueError:
        raise InputError(f"{flag}={value!r} is not a number") from None
    if not inside:
        raise InputError(f"{flag}={value} {reason}")
    return Decimal(str(value))


def _numbers(flag: str, text: str) -> list[Decimal]:
    return [_number(flag, part) for part in text.split(",")]


def _measured_lines(row: PlanRow, prompts: int, trials: Sequence[int] | None, confidence: float) -> list[str]:
    p_ref = _band(row.p_ref, row.p_ref_low, row.p_ref_high)
    behind = f"taken as exact: p_ref = {p_ref}"
    if trials is not None:
        low, high = min(trials), max(trials)
        each = f"{low}" if low == high else f"{low} to {high}"
        behind = f"{each} trials each: p_ref = {p_ref} ({confidence:.4g} intervals)"
    return [
        f"measured      {prompts} prompt{'s' if prompts > 1 else ''}, {behind}",
        f"KL budget     {row.kl_budget:.4g} nats per completion, the mean of ln(1/p_ref)",
        f"dead groups   {row.dead_groups_start:.1%} at p_ref; {row.dead:.1%} of prompts hardly ever see a success",
    ]


def _table(rows: list[PlanRow], speed: float | None) -> list[str]:
    cells = [_cells(row, speed) for row in rows]
    lines = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _cells(row: PlanRow, speed: float | None) -> dict[str, str]:
    """One line of the table, by the heads of its columns."""
    steps, step_kl = row.mirror_steps, row.mirror_step_kl
    training = {} if speed is None else {"training": "never" if row.training is None else str(row.training)}
    return {
        "β": f"{row.beta:.4g}",
        "p*": _band(row.p_star, row.p_star_low, row.p_star_high),
        **({} if row.attainable is None else {"p†": _band(*row.attainable)}),
        "saturate": f"{row.saturates:.1%}",
        "stay dead": f"{row.dead:.1%}",
        "oscillate": f"{row.oscillates:.1%}",
        "on a fold": f"{row.folds:.1%}",
        "KL": f"{row.kl:.3g}",
        "dead groups": f"{row.dead_groups:.1%}",
        "exact: iterations": "never" if row.iterations is None else str(row.iterations),
        "→ p": f"{row.p_exact:.3f}",
        "mirror: steps": "-" if steps is None else f"{steps:.3g}" if steps >= 1 else "< 1",
        "KL/step": "-" if step_kl is None else f"{step_kl:.3g}",
        **training,
    }


def _legend(row: PlanRow, speed: float | None, r2: Mean | None) -> list[str]:
    lines = [
        "columns       saturate: p* > 0.99 · oscillate and exact: were each iteration solved exactly · on a fold: p* jumps",
        "              within the interval of p_ref · mirror: small steps of mirror GRPO to 95 % of the gain",
    ]
    if speed is not None:
        lines.append(
            "training      iterations until the mean is within 5 % of its gain, "
            f"at κ = {speed:.3g} an iteration (peak learning rate)"
        )
    if r2 is not None:
        lines.append(
            f"p†            expected of this network, which lets R² = {r2.mean:.3f} [{r2.low:.3f}, {r2.high:.3f}] of the pull "
            "through, at least; p* is the end if it lets all through"
        )
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


def _target_lines(target: TargetBeta, asked: Decimal) -> list[str]:
    if target.jumps_to is None:
        return [f"target        β = {target.beta:.6g} leads to p* = {target.p_star:.4f}."]
    return [
        f"target        no β leads to p* = {asked}: a fold jumps over it. "
        f"β = {target.beta:.6g} leads to {target.p_star:.4f}, and",
        f"              any smaller β to {min(target.jumps_to, 0.9999):.4f} or more.",
    ]


def _sweep_lines(sweep: BetaRange | None, row: PlanRow, kl: str) -> list[str]:
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


def _plot(path: str, points: Sequence[CurvePoint], rows: list[PlanRow], sweep: BetaRange | None, title: str) -> None:
    """Writes a PNG: p* over β, its mean with the interval, pairs of quantiles, and the recommended range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
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

"""Forms of the same work against each other: processes that take turns, on one machine and in one run.

Every form is a process of its own that has written its weights into memory, compiled, and run once. Then they take turns, a
repetition each, so that what else the machine does falls on all alike, and each waits until the one before has come to rest. A
form is any program that reads a `cases.Case` from its first line of standard input, as `cases.write` requests it, and answers
it and every further line with a line of JSON: first ``versions`` and ``check`` (logits and gradient norms, equal in all forms to
five digits), then, after a repetition, ``tokens`` and whether it ``compiled`` something, which is then repeated. Time, processor
time and memory are read from outside.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
from absl import app, flags

from experiments.benchmarks import cases
from experiments.benchmarks.cases import Case

HERE = Path(__file__).resolve().parent
DIGITS = 1e-5  # how far logits and gradient norms of two forms may be apart, relative
LENGTHS = ("fixed", "ragged")
TRIES = 10  # repetitions that may compile before one does not
SETTLE = 0.25  # seconds without work after which a worker is done: it answers before its memory is given back
PATIENCE = 20  # such waits at most
UNTRIMMED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


class Form(NamedTuple):
    """A program that does the work, and what its environment has beyond ours."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = {}


def forms(environment: Mapping[str, str]) -> list[Form]:
    """Ours, the yardstick, and the peers whose interpreters are named; ``peers.py`` makes these.

    >>> [form.name for form in forms({"GRPO_JAX_TUNIX_PYTHON": "python"})]
    ['ours', 'plain', 'Tunix']
    """
    here = [Form(name, (sys.executable, "-m", f"experiments.benchmarks.{name}")) for name in ("ours", "plain")]
    if python := environment.get("GRPO_JAX_TRL_PYTHON"):
        command = (python, str(HERE / "trl_worker.py"))
        here += [Form("TRL", command), Form("TRL, memory kept", command, UNTRIMMED)]
    if python := environment.get("GRPO_JAX_TUNIX_PYTHON"):
        here.append(Form("Tunix", (python, str(HERE / "tunix_worker.py"))))
    return here


def race(case: Case, runners: list[Form], repeats: int) -> list[dict[str, Any]]:
    """A row for every form: medians and spread of ``repeats`` rounds, memory, and what starting costs.

    A form's useful tokens per second are the tokens of an average repetition of all forms, which sample from the same
    distribution, over the form's median time: else luck with lengths would count.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = cases.write(case, folder)
        rows, workers = [], []
        for number, form in enumerate(runners):
            cache = folder / f"cache{number}"
            with Worker(form, request, cache) as cold:
                first = cold.ask()
            row = {"form": form.name, "case": case._asdict(), **cold.ready, "first_cold": first["seconds"]}
            row["check"] = [*row["check"], *first.get("check", [])]
            rows.append(row)
            workers.append(Worker(form, request, cache))
        try:
            agree([(row["form"], row["check"]) for row in rows])
            for row, worker in zip(rows, workers, strict=True):
                row["first_cached"] = worker.ask()["seconds"]
                worker.warm()
                row["peak_mib"] = worker.peak_mib()
            turns = [[worker.warm() for worker in workers] for _ in range(repeats)]
        finally:
            for worker in workers:
                worker.close()
    tokens = statistics.mean(answer["tokens"] for turn in turns for answer in turn)
    for row, answers in zip(rows, zip(*turns, strict=True), strict=True):
        for key in ("seconds", "cpu_seconds"):
            values = [answer[key] for answer in answers]
            row[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
        row["tokens"] = statistics.mean(answer["tokens"] for answer in answers)
        row["tokens_per_second"] = tokens / row["seconds"]["median"]
        for key in ("cold", "cached"):
            row[f"compile_{key}"] = max(0.0, row.pop(f"first_{key}") - row["seconds"]["median"])
    return rows


def agree(checks: list[tuple[str, list[float]]]) -> None:
    """Raises ValueError where a form's numbers are not those of the first form.

    >>> agree([("ours", [1.0, 2.0]), ("plain", [1.0, 2.1])])
    Traceback (most recent call last):
    ...
    ValueError: plain computes [1.0, 2.1] where ours has [1.0, 2.0]: not the same work
    """
    (first, expected), *others = checks
    largest = max(map(abs, expected))
    for name, values in others:
        near = [abs(a - b) <= DIGITS * max(abs(a), 0.1 * largest) for a, b in zip(expected, values, strict=True)]
        if not all(near):
            raise ValueError(f"{name} computes {values} where {first} has {expected}: not the same work")


class Worker:
    """A running form."""

    def __init__(self, form: Form, request: dict[str, Any], cache: Path) -> None:
        self.form = form
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        platforms = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self.process = subprocess.Popen(
            form.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **platforms, **form.environment, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            cwd=HERE.parent.parent,
        )
        self.ready = self._exchange(json.dumps(request))

    def ask(self) -> dict[str, Any]:
        """One repetition: the worker's answer, with the seconds that it took, and those of all processors."""
        start, cpu = time.perf_counter(), self._cpu_seconds()
        answer = self._exchange("again")
        seconds = time.perf_counter() - start
        self._settle()
        return answer | {"seconds": seconds, "cpu_seconds": self._cpu_seconds() - cpu}

    def warm(self) -> dict[str, Any]:
        """One repetition that compiled nothing."""
        for _ in range(TRIES):
            if not (answer := self.ask()).get("compiled"):
                return answer
        raise RuntimeError(f"{self.form.name} still compiles after {TRIES} repetitions")

    def peak_mib(self) -> float | None:
        """By how much one repetition raises the memory in use; None where the system does not say."""
        reset = Path(f"/proc/{self.process.pid}/clear_refs")
        if not (reset.exists() and os.access(reset, os.W_OK)):
            return None
        before = self._kilobytes("VmRSS")
        reset.write_text("5", encoding="ascii")
        self.warm()
        return (self._kilobytes("VmHWM") - before) / 1024

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, line: str) -> dict[str, Any]:
        answer = ""
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass
        if not answer:
            self.errors.seek(0)
            raise RuntimeError(f"{self.form.name} died:\n{self.errors.read()[-2000:]}")
        return json.loads(answer)

    def _cpu_seconds(self) -> float:
        """Of all threads, also those that have ended, in hundredths; nan where the system does not say."""
        file = Path(f"/proc/{self.process.pid}/stat")
        if not file.exists():
            return float("nan")
        after_name = file.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")

    def _settle(self) -> None:
        """Waits until it hardly works any longer, so that the next in turn has the machine for itself."""
        for _ in range(PATIENCE):
            before = self._cpu_seconds()
            time.sleep(SETTLE)
            if not self._cpu_seconds() - before > SETTLE / 10:
                return

    def _kilobytes(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of a case as Markdown; ratios are speeds over plain's.

    >>> print(table([]), end="")
    | form | useful tokens/s | s (spread) | CPU s | × plain | peak MiB | compile s, cold | cached |
    |---|---|---|---|---|---|---|---|
    """
    lines = ["| form | useful tokens/s | s (spread) | CPU s | × plain | peak MiB | compile s, cold | cached |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    ratio_of = ratios(rows)
    for row in rows:
        s = row["seconds"]
        cells = [row["form"], f"{row['tokens_per_second']:,.0f}", f"{s['median']:.3g} ({s['low']:.3g}–{s['high']:.3g})"]
        cells += [f"{row['cpu_seconds']['median']:.3g}", f"{ratio_of['plain'] / ratio_of[row['form']]:.2f}"]
        cells += ["–" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"]
        cells += [f"{row['compile_cold']:.1f}", f"{row['compile_cached']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as long as ours each form takes.

    >>> ratios([{"form": "ours", "seconds": {"median": 2.0}}, {"form": "plain", "seconds": {"median": 3.0}}])
    {'ours': 1.0, 'plain': 1.5}
    """
    medians = {row["form"]: row["seconds"]["median"] for row in rows}
    return {form: median / medians["ours"] for form, median in medians.items()}


def define_flags() -> None:
    """Those of all commands that race."""
    define_case_flags()
    flags.DEFINE_list("forms", None, "Only these; ours and plain are needed.")
    among("forms", [form.name for form in forms(os.environ)], needed=("ours", "plain"))


def define_case_flags() -> None:
    """What is measured, how often, and where the results go."""
    flags.DEFINE_list("vocabularies", ["1024", "32000"], "Sizes V of the vocabulary.")
    flags.DEFINE_list("lengths", list(LENGTHS), "Of the completions.")
    flags.DEFINE_integer("repeats", 7, "Rounds.", lower_bound=1)
    among("lengths", LENGTHS)
    flags.register_validator(
        "vocabularies",
        lambda values: all(v.isdigit() and int(v) >= 64 for v in values),
        "must be numbers of 64 or more",
    )
    flags.DEFINE_string("out", "runs/benchmarks", "Where the JSON goes.")
    flags.DEFINE_bool("quick", False, "Small shapes and few repeats.")


def among(flag: str, choices: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Refuses other values of a list flag, and a list without what is needed."""
    words = f"must be among {', '.join(choices)}" + (f", with {' and '.join(needed)}" if needed else "")
    flags.register_validator(
        flag, lambda values: values is None or (bool(values) and set(needed) <= set(values) <= set(choices)), words
    )


def run(work: str, arguments: list[str]) -> None:
    """Races every case of a work, prints a table for each, and writes a JSON file named after the work."""
    if len(arguments) > 1:
        raise app.UsageError(f"not understood: {' '.join(arguments[1:])}")
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")  # as the workers'
    options, rows = flags.FLAGS, []
    runners = [form for form in forms(os.environ) if options.forms is None or form.name in options.forms]
    for vocabulary in map(int, options.vocabularies):
        for lengths in options.lengths:
            case = Case(work, vocabulary, lengths == "ragged")
            case = cases.quick(case) if options.quick else case
            measured = race(case, runners, 3 if options.quick else options.repeats)
            print(f"{case.name}\n\n{table(measured)}", flush=True)
            rows += measured
            write_json(options.out, work, rows)


def write_json(out: str, name: str, rows: list[dict[str, Any]], module: str | None = None) -> None:
    """Rows, the machine and the command, of a module of the same name unless it is given."""
    machine = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}
    command = " ".join(["python", "-m", f"experiments.benchmarks.{module or name}", *sys.argv[1:]])
    content = {"machine": machine, "command": command, "rows": rows}
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())

"""Command lines and calls that mean nothing, by the hundred: each must end in words that say what is wrong.

    python -m tests.fuzz [--lines=500] [--calls=500]

A command line is wrong if it ends in a stack trace, or if a mistake in it ends with anything but 2 or leaves a directory behind;
a call, if it raises what is neither ValueError nor TypeError, or gives NaN for numbers that it took without a word.
"""

import argparse
import inspect
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from absl import app

from configs import default
from grpo_jax import command
from grpo_jax.runs import evaluation, loop  # here and not in each child: a line then takes its own time alone
from tests.tiny_run import flags

ROOT = Path(__file__).resolve().parent.parent
VALUES = (
    '', ' ', 'nan', 'inf', '-inf', '-1', '0', '1', '2', '7', '1e39', '1e-320', '1e400', '-0.0',
    '9999999999999999999999', '[]', '()', '(1,2', '(1,)', "('a','b')", 'None', 'null', 'true', 'False', 'x', '../x',
    '/etc', '/dev/null', 'gs://', 'gs://b/../c', 's3://b/c', "'", '"', '\\', '%s%n', '{sum}', '💥', '\x1b[31m',
    "a" * 5000, '1_000', '0x10', '1.5', 'builtins:eval', ':', 'a:b:c', 'mean', 'GRPO', 'none',
)  # fmt: skip
FLAGS = (
    "mode",
    "checkpoint",
    "name",
    "devices",
    "topology",
    "target",
    "sweep",
    "processes",
    "num_processes",
    "wait",
    "list",
    "workdir",
    "nonsense",
)
SECONDS = 60


def command_lines(number: int, workdir: Path) -> Iterator[list[str]]:
    """Flags of the tiny run with one to three that are drawn by chance."""
    from grpo_jax.config import flat

    dice, keys = random.Random(0), sorted(flat(default.get_config()))
    for _ in range(number):
        line = [f"--config={ROOT / 'configs/default.py'}", f"--workdir={workdir}", *flags()]
        for _ in range(dice.choice((1, 1, 2, 3))):
            key = f"config.{dice.choice(keys)}" if dice.random() < 0.8 else dice.choice(FLAGS)
            line.append(f"--{key}={dice.choice(VALUES)}")
        yield line


def run_line(line: list[str], workdir: Path) -> tuple[int, str]:
    """(exit code, stderr) of launch.py in a child that stops where a run would begin; -9 for one that takes a minute."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            os.chdir(workdir.parent)  # a relative --workdir that was drawn lies there
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
            sys.argv = ["launch.py", *line]
            loop.run_phases = lambda run, dropped: {}  # type: ignore[assignment]
            evaluation.measure_and_write = lambda *_, **__: {}  # type: ignore[assignment]
            app.run(command.main, flags_parser=command.parse)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def fault_of_line(code: int, said: str, workdir: Path) -> str | None:
    """What is wrong with how it ended; None for nothing."""
    if "Traceback" in said:
        return "a stack trace"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and workdir.exists():
        return "a directory left behind"
    if code == 2 and not said.strip():
        return "no word"
    return None


def calls(number: int) -> Iterator[tuple[str, Any, list[Any], dict[str, Any]]]:
    """(name, function, arguments): public functions, with values drawn by chance."""
    import jax.numpy as jnp

    import grpo_jax as gj
    from grpo_jax import theory

    dice = random.Random(0)
    arrays = (
        jnp.zeros((0,)),
        jnp.zeros((2, 4)),
        jnp.full((3,), jnp.nan),
        jnp.array([0.2, 0.4]),
        jnp.array([1, 0, 1]),
        np.ones((2, 2, 2)),
    )
    plain = (
        None,
        -1,
        0,
        1,
        2,
        8,
        0.3,
        1.5,
        -0.1,
        1e39,
        float("nan"),
        float("inf"),
        "mean",
        "",
        [],
        [0.2, 0.4],
        (1, 2),
        {},
        True,
        1j,
    )
    weights = (theory.Group(8), theory.Whitened(), theory.WhitenedStd(), theory.MeanOnly())
    public = {f"theory.{name}": getattr(theory, name) for name in theory.__all__}
    public |= {name: getattr(gj, name) for name in ("group_advantages", "grpo_loss", "completion_logps")}
    public = {name: f for name, f in public.items() if callable(f) and not isinstance(f, type)}
    for _ in range(number):
        name = dice.choice(sorted(public))
        positional, named = [], {}
        for key, parameter in inspect.signature(public[name]).parameters.items():
            if parameter.default is not inspect.Parameter.empty and dice.random() < 0.7:
                continue
            value = dice.choice(weights) if key == "weights" and dice.random() < 0.9 else dice.choice(arrays + plain)
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                named[key] = value
            elif parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and len(positional) == len(named):
                positional.append(value)
            else:
                named[key] = value
        yield name, public[name], positional, named


def fault_of_call(function: Any, positional: list[Any], named: dict[str, Any]) -> str | None:
    """What is wrong with what it did; None for nothing."""
    import jax

    from grpo_jax import theory

    def finite(values: Any) -> bool:
        leaves = [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(values)
            if isinstance(leaf, (int, float, jax.Array, np.ndarray))
        ]
        return all(not np.isnan(leaf).any() for leaf in leaves if leaf.dtype.kind == "f")

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            given = function(*positional, **named)
            ok = (
                finite(given)
                or not finite([positional, named])
                or any(isinstance(x, float) and x == 1e39 for x in [*positional, *named.values()])
            )
    except (ValueError, TypeError):
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
    return None if ok or function is theory.beta_for_target else "NaN"  # whose NaN says that no β leads there


def main() -> None:
    """Prints every fault and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--calls", type=int, default=500)
    options = parser.parse_args()
    lines: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(command_lines(options.lines, Path(folder, "run"))):
            workdir = Path(folder, str(number))
            line[1] = f"--workdir={workdir}"
            code, said = run_line(line, workdir)
            fault = fault_of_line(code, said, workdir)
            lines["fault" if fault else {0: "would run"}.get(code, "refused")] += 1
            if fault:
                print(f"{fault}: {' '.join(line[2 + len(flags()) :])[:200]} → {said.strip()[-300:]}", flush=True)
    found: Counter[str] = Counter()
    for name, function, positional, named in calls(options.calls):
        fault = fault_of_call(function, positional, named)
        found["fault" if fault else "answered or refused"] += 1
        if fault:
            print(f"{fault}: {name}(*{positional}, **{named})"[:400], flush=True)
    print(f"command lines: {dict(lines)}; calls: {dict(found)}")
    sys.exit(lines["fault"] + found["fault"] > 0)


if __name__ == "__main__":
    main()

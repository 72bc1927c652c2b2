"""Attacks on a run directory: after each, a start ends in the bytes of the unbroken run, or says in words what is wrong.

    python -m tests.attacks [--flips=300] [--workdir=FOLDER]

Every attack is a change of a run that was stopped half-way, or of one that is finished; then the run is started again. "same" is
the end in the same bytes; "refused" an error that launch.py prints in words, with nothing lost; anything else is a fault, and the
exit code then is 1.
"""

import argparse
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from rich.console import Console

from grpo_jax.files import read_json, write_json
from grpo_jax.runs import loop
from grpo_jax.runs.errors import Preempted
from grpo_jax.runs.loop import train
from tests.tiny_run import tiny_config

FILES = ("config.json", "metrics.jsonl", "reference.json", "samples.json", "result.json")
CHANGES: dict[str, Any] = {
    "warm_start__target": 0.01,
    "warm_start__interval": 1,
    "warm_start__samples": 8,
}
CHANGES |= {"attainable__steps": 2, "attainable__samples": 96, "train__iterations": 6, "evaluate__samples": 8}


class Attack(NamedTuple):
    """A change of a run directory, and on which of the two it is made: "stopped" or "finished"."""

    name: str
    state: str
    act: Callable[[Path], Any]


def started(path: Path) -> None:
    """Starts or resumes the run."""
    with jax.numpy_dtype_promotion("standard"):
        train(tiny_config(**CHANGES), path, Console(quiet=True))


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """SIGTERM arrives while the stretch of iterations of this number runs."""
    advance, calls = loop.advance, []

    def interrupted(run: Any, *arguments: Any) -> Any:
        calls.append(run)
        if len(calls) == after:
            run.signals.append(15)
        return advance(run, *arguments)

    loop.advance = interrupted  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.advance = advance


def make_states(folder: Path) -> dict[str, Path]:
    """The run, stopped and finished."""
    started(folder / "finished")
    try:
        with stopping(after=3):
            started(folder / "stopped")
    except Preempted:
        return {name: folder / name for name in ("stopped", "finished")}
    raise AssertionError("the run was not stopped")


def outcome(attack: Attack, states: dict[str, Path], at: Path) -> str:
    """ "same", "refused: …" or "FAULT: …"."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(states[attack.state], at)
    attack.act(at)
    try:
        started(at)
    except (RuntimeError, ValueError, OSError) as error:  # what launch.py prints in words
        words = " ".join(str(error).split())
        named = words and not words.startswith("INTERNAL")
        return f"refused: {words[:200]}" if named else f"FAULT: {words}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT: {type(error).__name__} {error} in {Path(where.filename).name}:{where.lineno}"
    for name in FILES:
        if (at / name).read_bytes() != (states["finished"] / name).read_bytes():
            return f"FAULT: {name} differs, and nothing was said"
    return "same"


def files_of(folder: Path) -> list[str]:
    """All files of a run directory but timings, pictures and pages, which nothing reads."""
    unread = ("perf.jsonl", "figure.png", "report.md", "report.html", "tensorboard")
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not name.startswith(unread) and (folder / name).stat().st_size]


def flips(states: dict[str, Path], number: int) -> Iterator[Attack]:
    """Single bits, at random places of random files."""
    dice = np.random.default_rng(0)
    for _ in range(number):
        state = ("stopped", "finished")[int(dice.integers(4) == 0)]
        names = files_of(states[state])
        # Half of them in files that Orbax does not compress and check itself.
        plain = [name for name in names if name.endswith((".json", ".jsonl", "metadata"))]
        name = str(dice.choice(plain if dice.integers(2) else names))
        place = int(dice.integers(8 * (states[state] / name).stat().st_size))

        def flip(at: Path, name: str = name, place: int = place) -> None:
            content = bytearray((at / name).read_bytes())
            content[place // 8] ^= 1 << place % 8
            (at / name).write_bytes(content)

        yield Attack(f"bit {place} of {name}", state, flip)


def edits(states: dict[str, Path]) -> Iterator[Attack]:
    """By hand: other JSON, cut, emptied, gone, renamed, another's."""
    steps = sorted(int(path.name) for path in (states["stopped"] / "checkpoints").iterdir() if path.name.isdigit())
    newest = f"checkpoints/{steps[-1]}"
    texts = ["[]", "{}", "null", "NaN", '"x"', "", '{"iteration": 3}\n', '{"iteration": "7"}\n', "[" * 100_000]

    def put(name: str, text: str, at: Path) -> None:
        (at / name).write_text(text)

    def cut(name: str, at: Path) -> None:
        (at / name).write_bytes((at / name).read_bytes()[:-40])

    def remove(name: str, at: Path) -> None:
        shutil.rmtree(at / name) if (at / name).is_dir() else (at / name).unlink()

    for name in ("config.json", "reference.json", "attainable.json", "metrics.jsonl", f"{newest}/meta/metadata"):
        for text in texts:
            yield Attack(f"{name} := {text[:20]!r}", "stopped", partial(put, name, text))
        yield Attack(f"{name} gone", "stopped", partial(remove, name))
        yield Attack(f"{name} cut", "stopped", partial(cut, name))
    for text in texts:
        yield Attack(f"result.json := {text[:20]!r}", "finished", partial(put, "result.json", text))

    def change(name: str, key: str, value: Any, at: Path) -> None:
        write_json(at / name, read_json(at / name) | {key: value})

    for key, value in (("step", 1), ("base_key", [1, 0]), ("rows", "x"), ("checksums", {}), ("data_position", 3)):
        act = partial(change, f"{newest}/meta/metadata", key, value)
        yield Attack(f"{key} of the checkpoint := {value}", "stopped", act)
    yield Attack("a trial more", "stopped", partial(change, "reference.json", "trials", 17))
    yield Attack("p_final of the result", "finished", partial(change, "result.json", "p_final", "high"))
    yield Attack("seed of the config", "stopped", partial(change, "config.json", "seed", 5))
    for name in ("reference", "reference/0", "checkpoints", newest, f"{newest}/state", f"{newest}/meta"):
        yield Attack(f"{name}/ gone", "stopped", partial(remove, name))
    yield Attack("the newest step renamed", "stopped", lambda at: (at / newest).rename(at / "checkpoints/30"))
    yield Attack(
        "a copy of it as a later one", "stopped", lambda at: shutil.copytree(at / newest, at / "checkpoints/30")
    )
    yield Attack("rows of metrics.jsonl swapped", "stopped", lambda at: swap(at / "metrics.jsonl"))


def swap(path: Path) -> None:
    """The second row and the third."""
    first, second, third, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, third, second, *rest]))


def attacked(
    attacks: Iterator[Attack], states: dict[str, Path], at: Path, show: Callable[..., Any] = print
) -> Counter[str]:
    """The outcomes, counted; every refusal and every fault is shown."""
    counts: Counter[str] = Counter()
    for attack in attacks:
        found = outcome(attack, states, at)
        counts[found.partition(":")[0]] += 1
        if found != "same":
            show(f"{counts.total()}: {attack.state}, {attack.name}: {found}", flush=True)
    return counts


def main() -> None:
    """Prints what was refused, faults, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdir or Path(temporary)
        states, lines = make_states(folder), []
        for name, attacks in (("flipped bits", flips(states, options.flips)), ("edits by hand", edits(states))):
            counts = attacked(attacks, states, folder / "attacked")
            lines.append(f"| {name} | {counts.total()} | {counts['same']} | {counts['refused']} | {counts['FAULT']} |")
    print("\n".join(["| attack | tried | same bytes | refused in words | faults |", "|---|---|---|---|---|", *lines]))
    sys.exit(any(not line.endswith("| 0 |") for line in lines))


if __name__ == "__main__":
    main()

"""The progress of a long phase where there is no terminal: plain lines, whose pace is that of the steps after the first."""

import io

from rich.console import Console

from grpo_jax.report import progress as module


def test_what_is_left_does_not_count_the_first_step_which_compiles(monkeypatch):
    clock, said = iter([0.0, 100.0, 101.0, 112.0, 113.0]), io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    console = Console(file=said, width=100)
    with module.progress(console, "iterations", total=20, done=2) as line:
        for done in (3, 4, 15, 20):
            line.update(done, f"step {done}")
    assert said.getvalue().splitlines() == [
        "iterations 3/20 · step 3",
        "iterations 15/20 · 1.0/s · 5 s left · step 15",
        "iterations 20/20 · 1.3/s · 0 s left · step 20",
    ]

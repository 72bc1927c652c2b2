"""The benchmarks run, measure what they say, and say when something does not fit."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import logps, parts

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_command_compares_every_form(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.logps", "--quick", "--entropy", f"--out={tmp_path}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = json.loads((tmp_path / "logps.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["form"], r["phase"]) for r in rows] == [(f, p) for f in logps.FORMS for p in logps.PHASES]
    for row in rows:
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert f"| {row['form']} | {row['phase']} |" in printed


def test_the_forms_are_the_same_function():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, matrix = jax.random.normal(keys[0], (4, 8, 16)), jax.random.normal(keys[1], (16, 64))
    targets = jax.random.randint(keys[2], (4, 8), 0, 64)

    def outputs(form):
        loss = lambda h, w: (lambda a, b: (jnp.sin(a).sum(), (a, b)))(*form(h, w, targets, chunk_size=2))  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, matrix))

    plain, *others = (outputs(form) for form in logps.FORMS.values())
    for other in others:
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_peak_memory_is_what_a_program_adds():
    x = jnp.ones((1024, 8))
    for mib in (64, 256):
        product = jax.jit(lambda x, n=256 * mib: jnp.sin(x @ jnp.ones((8, n))).sum())  # XLA writes products down
        found = logps._memory(product.lower(x).compile(), x)
        assert found["temporary_mib"] >= mib
        if found["peak_mib"] is not None:  # on Linux
            assert 0.9 * found["temporary_mib"] < found["peak_mib"] < found["temporary_mib"] + 32


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(logps, "SPARE", 1e6)
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(2)).compile()
    assert "not run: needs 1000000.0 GiB" in logps._memory(compiled, jnp.ones(2))["refused"]
    row = {"form": "plain", "phase": "forward", "refused": "not run", "temporary_mib": 1.0}
    assert "| plain | forward | not run | – | – | – | 1 | 1.0 |" in logps.table([row])


def test_an_iteration_is_split_into_its_parts(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.parts",
        "--quick",
        "--vocabularies=1024",
        f"--out={tmp_path}",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = json.loads((tmp_path / "parts.json").read_text(encoding="utf-8"))["rows"]
    assert [row["case"]["ragged"] for row in rows] == [False, True]
    for row in rows:
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert list(row["parts"]) == list(parts.PARTS)
        assert abs(sum(row["parts"].values()) - row["seconds"]["iteration"]) < 1e-9
    assert printed == parts.table(
        {case: row["parts"] for case, row in zip(("fixed 64", "ragged 64"), rows, strict=True)}
    )


def test_examples():
    assert doctest.testmod(logps).failed == 0
    assert doctest.testmod(parts).failed == 0

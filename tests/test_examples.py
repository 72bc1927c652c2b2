"""The examples do what they print: our loss, inside other people's models, takes success where the theory said."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from examples import equinox_model, flax_nnx, plain

ROOT = Path(__file__).resolve().parent.parent
TUNIX = "GRPO_JAX_TUNIX_PYTHON"

# The examples are other people's programs: they run with jax's own defaults, and not with the strict ones of these tests.
pytestmark = pytest.mark.usefixtures("defaults_of_jax")

# Fewer steps than the examples take by default: over seeds, success was then within 0.03 of p*, and per prompt within 0.05.
STEPS, NEAR = 150, 0.05


@pytest.fixture
def defaults_of_jax() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("main", [plain.main, flax_nnx.main, equinox_model.main], ids=["plain", "flax_nnx", "equinox"])
def test_training_ends_where_the_theory_says(main: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    before, predicted, after = (np.asarray(p) for p in main(steps=STEPS))
    assert before.shape == (3,)
    assert 0.15 < before.mean() < 0.25
    assert after.mean() == pytest.approx(predicted.mean(), abs=NEAR)
    assert after == pytest.approx(predicted, abs=2 * NEAR)
    assert predicted.mean() > before.mean() + 0.35
    printed = parse(capsys.readouterr().out)
    assert printed == pytest.approx(np.round([before.mean(), predicted.mean(), after.mean()], 3), abs=2e-3)


def test_without_steps_nothing_changes() -> None:
    before, predicted, after = (np.asarray(p) for p in plain.main(steps=0))
    assert after == pytest.approx(before, abs=0.03)  # 4,096 samples each
    assert np.all(predicted > before + 0.2)


@pytest.mark.slow
def test_tunix_trains_with_our_loss() -> None:
    python = os.environ.get(TUNIX)
    if not python:
        pytest.skip(f"{TUNIX} names no interpreter of an environment with google-tunix")
    # Not the flags of this process: Tunix shards over all devices there are.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    run = subprocess.run(
        [python, "-m", "examples.tunix_learner"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, predicted, after = parse(run.stdout)
    assert "traced our loss for [B, T] = (192, 4)" in run.stdout
    assert after == pytest.approx(predicted, abs=NEAR)
    assert predicted > before + 0.3


def parse(output: str) -> list[float]:
    """The means that an example prints: before, predicted p*, after."""
    return [
        float(re.search(rf"^{re.escape(name)} +([\d.]+) ", output, re.M).group(1))  # type: ignore[union-attr]
        for name in ("before", "predicted p*", "after")
    ]

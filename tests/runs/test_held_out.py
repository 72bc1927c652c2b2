"""Prompts that are held out: never trained on, measured all the same."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.files import read_jsonl, read_sealed
from grpo_jax.runs import loop, reference
from grpo_jax.runs.evaluation import evaluate
from grpo_jax.runs.setup import make_setup, split_rows
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")

FEW = 4
OPTIONS = {"evaluate__held_out": FEW, "train__iterations": 3, "evaluate__interval": 1, "warm_start__target": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, result, what it said, rows that were trained on)."""
    directory, said, trained = tmp_path_factory.mktemp("held_out") / "run", io.StringIO(), set()
    put_prompts, visits = reference.put_prompts, loop.visits

    def of_warm_start(setup, index):
        trained.update(index.tolist())
        return put_prompts(setup, index)

    def of_iterations(config, visited, done, count):
        index = visits(config, visited, done, count)
        trained.update(index[:count].ravel().tolist())
        return index

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(reference, "put_prompts", of_warm_start)
        patch.setattr(loop, "visits", of_iterations)
        result = loop.train(tiny_config(**OPTIONS), directory, Console(file=said, width=200))
    return directory, result, said.getvalue(), trained


def test_they_are_never_trained_on_and_always_measured(run):
    directory, result, said, trained = run
    visited, held_out = split_rows(16, FEW, seed=0)
    assert trained == set(visited.tolist()) and len(held_out) == FEW
    counts = read_sealed(directory / "reference.json")
    assert len(counts["held_out"]["successes"]) == FEW and len(counts["successes"]) == 16 - FEW
    probes = [row for row in read_jsonl(directory / "metrics.jsonl") if row["phase"] == "probe"]
    assert [row["iteration"] for row in probes] == [0, 1, 2]
    assert all(row["held_out/low"] <= row["held_out/mean"] <= row["held_out/high"] for row in probes)
    successes = np.array(counts["held_out"]["successes"]) / counts["held_out"]["trials"]
    assert result["held_out"]["p_ref"]["mean"] == pytest.approx(successes.mean()) == probes[0]["held_out/mean"]
    assert result["held_out"]["prompts"] == FEW and len(result["prompts"]["p_final"]) == 16 - FEW
    assert "12 prompts, G = 4" in said and " · held out 0." in said and "4 prompts held out" in said


def test_an_evaluation_measures_all_prompts(run):
    directory = run[0]
    with jax.numpy_dtype_promotion("standard"):
        found = evaluate(tiny_config(**OPTIONS), directory, Console(file=io.StringIO()), checkpoint="reference")
    assert found["prompts"] == 16


def test_without_them_all_rows_are_trained_on():
    config = tiny_config()
    setup = make_setup(config, *validate(config, num_devices=8))
    assert setup.visited.tolist() == setup.probed.tolist() == list(range(16)) and not len(setup.held_out)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate__held_out": -1}, "evaluate.held_out=-1 must be at least 0"),
        ({"evaluate__held_out": 9}, "exceeds the 7 prompts of task 'arithmetic' without evaluate.held_out=9"),
    ],
)
def test_too_many_are_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        validate(tiny_config(**changes), num_devices=8)
    assert words in str(error.value)

"""--extend: what a run goes on with is that of an unbroken run where nothing else changed, and is recorded where it did."""

import json

import jax
import pytest
from rich.console import Console

from grpo_jax.files import read_sealed
from grpo_jax.runs import loop
from grpo_jax.runs.errors import CheckpointError, Preempted, RunDirectoryError
from grpo_jax.runs.evaluation import evaluate
from grpo_jax.runs.loop import train
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")

CONSTANT = {"optimizer__schedule": "constant", "optimizer__warmup_updates": 0, "optimizer__learning_rate": 1e-2}
FOUR = CONSTANT | {"train__iterations": 4, "warm_start__target": 0.1}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(path, extend=False, **changes):
    return train(tiny_config(**FOUR | changes), path, Console(quiet=True), extend=extend)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_more_iterations_are_those_of_an_unbroken_run(tmp_path, monkeypatch):
    drawn, plot = [], loop.run_figure.plot_run
    monkeypatch.setattr(
        loop.run_figure,
        "plot_run",
        lambda *a, result, **k: (drawn.append(result.get("extended")), plot(*a, result=result, **k)),
    )
    short = run(tmp_path / "a")
    unbroken = run(tmp_path / "b", train__iterations=9)
    longer = run(tmp_path / "a", extend=True, train__iterations=9)
    for row, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        forecasts = {name for name in {*row, *other} if name.startswith("forecast/")}  # of other ends, or of none
        assert {k: v for k, v in row.items() if k not in forecasts} == {
            k: v for k, v in other.items() if k not in forecasts
        }
    extended = [{"after": 4, "changed": {"train.iterations": [4, 9]}}]
    assert longer["extended"] == extended == read_sealed(tmp_path / "a" / "config.json")["extended"]
    for name in ("p_final", "p_star", "ledger", "prompts"):
        assert longer[name] == unbroken[name]
    # The first result is kept; the same command, with the flag or without, reads the second, and an evaluation takes it.
    assert read_sealed(tmp_path / "a" / "result-4.json")["p_final"] == short["p_final"]
    assert run(tmp_path / "a", extend=True, train__iterations=9) == longer == run(tmp_path / "a", train__iterations=9)
    assert drawn == [None, None, extended]  # the seam is in the figure
    report = (tmp_path / "a" / "report.md").read_text()
    assert "after iteration 4: train.iterations 4 → 9" in report
    config = tiny_config(**FOUR | {"train__iterations": 9})
    assert evaluate(config, tmp_path / "a", Console(quiet=True))["checkpoint"] == "iteration-9"


def test_another_beta_from_an_interrupted_run_and_bits_that_do_not_depend_on_stops(tmp_path, monkeypatch):
    changes = {"objective__beta": 0.2, "optimizer__learning_rate": 5e-3, "train__iterations": 8}
    results, advance = [], loop.advance

    def stops_after(count):
        calls = []

        def interrupted(a_run, *arguments):
            calls.append(a_run.signals.append(15) if len(calls) == count else None)
            return advance(a_run, *arguments)

        monkeypatch.setattr(loop, "advance", interrupted)

    for name, stops in (("once", [1]), ("often", [1, 0, 0])):
        stops_after(stops[0])
        with pytest.raises(Preempted):
            run(tmp_path / name)
        for count in stops[1:]:
            stops_after(count)
            with pytest.raises(Preempted):
                run(tmp_path / name, extend=True, **changes)
        monkeypatch.setattr(loop, "advance", advance)
        results.append(run(tmp_path / name, extend=True, **changes))
    assert results[0] == results[1]
    assert (tmp_path / "once" / "metrics.jsonl").read_bytes() == (tmp_path / "often" / "metrics.jsonl").read_bytes()
    (one,) = results[0]["extended"]
    assert one["after"] in (2, 3) and one["changed"]["objective.beta"] == [1.0, 0.2]
    assert results[0]["beta"] == 0.2
    # Iterations before the seam are those of the first config.
    plain = run(tmp_path / "plain", train__iterations=8)
    there, unchanged = ([row for row in rows(tmp_path / path) if row["phase"] == "train"] for path in ("once", "plain"))
    assert there[: one["after"]] == unchanged[: one["after"]] and there[one["after"]] != unchanged[one["after"]]
    assert "extended" not in plain


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    with jax.numpy_dtype_promotion("standard"):
        run(path, train__average=0.5)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"train__iterations": 3}, "train.iterations=3 must be above 4, which are done"),
        ({"objective__beta": 2.0}, "must be above 4"),
        ({"train__iterations": 9}, "the average of the parameters in .* has begun"),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_and_changes_nothing(finished, changes, words):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file() and path.name != "lock"}
    with pytest.raises(RunDirectoryError, match=words):
        run(finished, extend=True, train__average=0.5, **changes)
    assert before == {path: path.read_bytes() for path in finished.iterdir() if path.is_file() and path.name != "lock"}


def test_without_the_flag_it_is_named(finished):
    with pytest.raises(RunDirectoryError, match="alone differ, --extend goes on with the run"):
        run(finished, train__average=0.5, train__iterations=9)


def test_a_seam_whose_checkpoint_is_damaged_is_no_other_seam(tmp_path):
    run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_iterations", None)
        with pytest.raises(TypeError):
            run(tmp_path, extend=True, train__iterations=9)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint from iteration 4 on is intact"):
        run(tmp_path, extend=True, train__iterations=9)

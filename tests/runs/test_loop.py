"""The loop: programs that end where the host is needed, runs that are stopped, that diverge, and that keep no reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import validate
from grpo_jax.runs import loop
from grpo_jax.runs.checkpoints import Checkpoints
from grpo_jax.runs.errors import CheckpointError, Diverged, NothingToLearn, Preempted
from grpo_jax.runs.loop import stretch, train
from grpo_jax.runs.measured_policy import find_policy
from grpo_jax.runs.memory import lasting_memory
from grpo_jax.runs.setup import make_setup
from grpo_jax.train.sharding import sharded_shapes
from tests.tiny_run import on_one_device, tiny_config

QUICK = {
    "warm_start__target": 0.01,
    "warm_start__interval": 1,
    "warm_start__samples": 8,
    "train__average": 0.7,  # of 7 iterations: the last 5
}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quiet():
    return Console(quiet=True)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((7, 3, 2, 10), [2, 1, 1, 2, 1]),
        ((7, 100, 100, 3), [3, 3, 1]),
        ((4, 1, 9, 10), [1] * 4),
        ((5, 9, 9, 1), [1] * 5),
    ],
)
def test_a_setup_ends_where_the_host_is_needed(sizes, wanted):
    names = ("train__iterations", "evaluate__interval", "checkpoint__interval", "train__iterations_per_program")
    config, done, found = tiny_config(**dict(zip(names, sizes, strict=True))), 0, []
    while done < config.train.iterations:
        found.append(stretch(config, done))
        done += found[-1]
    assert found == wanted


def finished(path, **changes):
    config = tiny_config(mesh__data=8, **QUICK, **changes)
    result = train(config, path, quiet())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return result, rows, (path / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "one"


@pytest.fixture(scope="module")
def one_by_one(directory):
    return finished(directory, train__iterations_per_program=1, checkpoint__interval=1, checkpoint__keep=9)


def test_the_rows_are_the_same_however_many_iterations_a_setup_holds(one_by_one, tmp_path):
    result, rows, written = one_by_one
    assert [r["iteration"] for r in rows if r["phase"] == "train"] == list(range(1, 8))
    probes = [r for r in rows if r["phase"] == "probe"]
    assert [r["iteration"] for r in probes] == [0, 3, 6]
    assert all(r["forecast/low"] < r["forecast/mean"] < r["forecast/high"] for r in probes[1:])
    assert [forecast["iteration"] for forecast in result["forecasts"]] == [1, 2, 4]
    for number in (2, 10):
        found, _, text = finished(tmp_path / str(number), train__iterations_per_program=number)
        assert text == written, number
        assert found == result


def test_a_run_that_is_stopped_within_a_setup_goes_on_behind_it(one_by_one, tmp_path, monkeypatch):
    """SIGTERM while a program of several iterations runs: they end and are saved; the rows are those of the unbroken run."""
    from grpo_jax.runs import loop

    advance, calls = loop.advance, []

    def interrupted(run, *arguments):
        calls.append(run)
        if len(calls) == 2:
            run.signals.append(15)
        return advance(run, *arguments)

    changes = {"checkpoint__interval": 7, "evaluate__interval": 3, "train__iterations_per_program": 2}
    monkeypatch.setattr(loop, "advance", interrupted)
    with pytest.raises(Preempted):
        finished(tmp_path / "run", **changes)
    monkeypatch.setattr(loop, "advance", advance)
    result, _, text = finished(tmp_path / "run", **changes)
    assert text == one_by_one[2]
    assert result == one_by_one[0]  # the average too, of which one iteration was done
    assert len(calls) == 2  # iterations 1 and 2, then 3, which ends at a probe


def test_the_average_is_that_of_the_last_iterations(one_by_one, directory):
    """It is the mean of the parameters in the checkpoints; what an evaluation finds; and measured beside the last iterate."""
    result = one_by_one[0]
    assert result["average"]["iterations"] == 5
    assert result["average"]["p_final"] != result["p_final"]
    assert result["average"]["p_final"]["mean"] == pytest.approx(np.mean(result["prompts"]["p_average"]))
    config = tiny_config(mesh__data=8, **QUICK)
    setup = make_setup(config, *validate(config, num_devices=8))
    like = sharded_shapes(jax.eval_shape(setup.compiled.start, setup.shapes), setup.mesh)
    checkpoints = Checkpoints(directory / "checkpoints", keep=None)
    paths = [checkpoints.restore(n, like)[0].params for n in (3, 4, 5, 6, 7)]
    checkpoints.close()
    mean = jax.tree.map(lambda *x: np.mean(np.array(x, np.float64), axis=0), *paths)
    policy = find_policy(config, setup, directory, "average", has_run=True)
    assert (policy.name, policy.iteration) == ("average-7", 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), policy.params, mean)
    longer = tiny_config(train__average=0.3, train__iterations=10)
    with pytest.raises(CheckpointError, match="the average begins after iteration 7, and the newest checkpoint is 7"):
        find_policy(longer, setup, directory, "average", has_run=True)


def test_divergence_ends_at_its_iteration_whatever_the_program(tmp_path, monkeypatch):
    """The rows end with the iteration that skipped once too often, though the program ran on."""
    from grpo_jax.runs import loop

    advance = loop.advance

    def poisoned(run, state, *arguments):
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params)
        return advance(run, state._replace(params=bad), *arguments)

    monkeypatch.setattr(loop, "advance", poisoned)
    config = {"train__max_skipped": 3, "evaluate__interval": 50, "checkpoint__interval": 50}
    with pytest.raises(Diverged, match=r"4 updates in a row .*\(iteration 4\)"):
        finished(tmp_path / "run", **config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["loss/skipped"] for r in rows[1:]] == [1.0] * 4


def poisoning(monkeypatch, which):
    """The updates of these iterations have no finite gradient."""
    from grpo_jax.runs import loop

    advance = loop.advance

    def poisoned(run, state, ref_params, table, done):
        if done + 1 not in which:
            return advance(run, state, ref_params, table, done)
        bad = state._replace(params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params))
        after, rows, skipped = advance(run, jax.tree.map(jnp.copy, bad), ref_params, table, done)
        return after._replace(params=state.params), rows, skipped

    monkeypatch.setattr(loop, "advance", poisoned)
    return {"train__iterations_per_program": 1, "train__average": 0.0}


@pytest.mark.slow
def test_a_run_most_of_whose_updates_were_skipped_fails_also_when_it_is_started_again(tmp_path, monkeypatch):
    changes = QUICK | poisoning(monkeypatch, {1, 2, 4, 5})
    for _ in range(2):
        with pytest.raises(Diverged, match="4 of 7 updates were skipped"):
            train(tiny_config(mesh__data=8, **changes), tmp_path / "run", quiet())


@pytest.mark.slow
def test_skipped_updates_are_counted_and_shown(tmp_path, monkeypatch):
    changes = QUICK | poisoning(monkeypatch, {2, 5})
    result = train(tiny_config(mesh__data=8, **changes), tmp_path / "run", quiet())
    assert result["skipped_updates"] == 2
    assert "| skipped updates | 2" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
def test_a_collapse_is_named_while_it_happens_and_stops_the_run_if_a_key_says_so(tmp_path, stops):
    said = []
    console = Console(quiet=True)
    console.print = lambda text, **_: said.append(str(text))
    changes = {"optimizer__learning_rate": 30.0, "evaluate__interval": 1, "train__stop_at_collapse": stops}
    config = tiny_config(mesh__data=8, **changes)
    if stops:
        with pytest.raises(Diverged, match=r"collapse at iteration [2-6]: "):
            train(config, tmp_path / "run", console)
    else:
        train(config, tmp_path / "run", console)
        assert any("collapse at iteration" in text and "Lower optimizer.learning_rate" in text for text in said)


@pytest.mark.slow
def test_no_reference_is_kept_where_the_objective_has_none(tmp_path, monkeypatch):
    """β = 0: iterations and probes know no reference and report no KL; the last measurement reads it back."""
    from grpo_jax.runs import loop

    seen, advance = [], loop.advance

    def watched(run, state, ref_params, *arguments):
        seen.append(ref_params)
        return advance(run, state, ref_params, *arguments)

    monkeypatch.setattr(loop, "advance", watched)
    changes = {"objective__name": "DAPO", "objective__beta": 0.0}
    result, rows, _ = finished(tmp_path / "run", **changes)
    assert seen
    assert all(ref is None for ref in seen)
    assert all(row.get("kl/sequence") is None for row in rows if row["phase"] == "train" or row["iteration"] > 0)
    assert abs(result["after"]["kl"]) > 0
    setup = on_one_device(**changes)[1]
    lasting = lasting_memory(setup.recipe, setup.shapes, setup.trained, setup.mesh)
    assert list(lasting) == ["parameters", "optimizer"]
    kept = on_one_device()
    assert list(lasting_memory(kept[1].recipe, kept[1].shapes, kept[1].trained, kept[1].mesh)) == [
        *lasting,
        "reference",
    ]
    # Its start takes the memory of the parameters it is given; with a reference it must not.
    for each, freed in ((setup, True), (kept[1], False)):
        params = each.initial_params(0)
        each.compiled.start(params)
        assert all(x.is_deleted() == freed for x in jax.tree.leaves(params))


def test_a_reference_that_never_succeeds_is_named_before_training(tmp_path, monkeypatch):
    """With what would help and two of its completions; the same run goes on where it is told to."""
    measured = loop.measured_reference
    monkeypatch.setattr(loop, "measured_reference", lambda run: measured(run) | {"successes": [0] * 16})
    config = tiny_config(train__iterations=1)
    with pytest.raises(NothingToLearn, match="none of 256 completions of the reference succeeded") as caught:
        train(config, tmp_path / "run", Console(quiet=True))
    assert "a warm start" in str(caught.value) and str(caught.value).count(" → ") == 2
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    config.train.without_success = True
    assert train(config, tmp_path / "run", Console(quiet=True))["p_ref"]["mean"] == 0

"""A sweep as one program: each point is the single run of its config, on any devices, and however often it is killed."""

import json
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.files import read_sealed
from grpo_jax.report.ledger import ledger_of_run
from grpo_jax.report.run_result import PER_PROMPT
from grpo_jax.runs.errors import Preempted, RunDirectoryError
from grpo_jax.runs.loop import Foretold, run_iterations
from grpo_jax.runs.measurement import measure
from grpo_jax.runs.reference import measured_reference, reference_params
from grpo_jax.runs.run import Run
from grpo_jax.runs.setup import make_setup, put_table
from grpo_jax.sweeps import one_program as sweep_module
from grpo_jax.sweeps.one_program import sweep
from grpo_jax.train.sweep_program import POINTS, WHOLE, make_sweep_functions, make_sweep_mesh
from tests.tiny_run import tiny_config

SEEDS, BETAS = (0, 3), tuple(np.geomspace(0.1, 10, 8).tolist())
CHANGES = {
    "warm_start__target": 0.01,
    "warm_start__interval": 1,
    "warm_start__samples": 8,
    "optimizer__learning_rate": 1e-2,
    "optimizer__warmup_updates": 1,
    "train__iterations": 5,
    "train__iterations_per_program": 2,
    "checkpoint__interval": 3,
    "mesh__data": 1,
}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quiet():
    return Console(quiet=True)


def swept(path, *, devices=None, batched=False, seeds=SEEDS, betas=BETAS, learning_rates=(), **changes):
    """(results, rows of metrics, last states) of a sweep of the tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "make_sweep_mesh", partial(make_sweep_mesh, devices=devices))
        config = tiny_config(**CHANGES | changes)
        options = {"seeds": seeds, "betas": betas, "learning_rates": learning_rates, "batched": batched}
        results = sweep(config, path, console=quiet(), **options)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return results, rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def eight(directory):
    return swept(directory / "eight")


def same_metrics(found, wanted, *, atol):
    assert len(found) == len(wanted) == 5
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        for name, values in other.items():
            if name != "phase":
                np.testing.assert_allclose(row[name], values, atol=atol, rtol=1e-3, err_msg=name)


def same_prompts(found, wanted):
    """Counts, and what follows from them alone, to the bit; what is made of log-ratios within their rounding."""
    for result, other in zip(found, wanted, strict=True):
        assert result["prompts"].keys() == other["prompts"].keys()
        for name, values in other["prompts"].items():
            atol = 1e-4 if name in PER_PROMPT else 0
            np.testing.assert_allclose(result["prompts"][name], values, rtol=0, atol=atol, err_msg=name)


def test_a_sweep_says_what_single_runs_say(eight):
    results, rows = eight
    assert [(r["seed"], r["beta"]) for r in results] == [(s, b) for s in SEEDS for b in BETAS]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert np.shape(rows[0]["reward/mean"]) == (2, 8)
    for result in results:
        assert len(result["prompts"]["p_final"]) == 16
        assert result["p_final"]["mean"] == pytest.approx(np.mean(result["prompts"]["p_final"]))
        assert not result["diverged"]
    stars = [r["p_star"]["mean"] for r in results[:8]]
    assert stars == sorted(stars, reverse=True)
    # Points part: they start alike and β moves them apart; seeds differ from the start.
    first, last = np.array(rows[0]["loss/grad_norm"]), np.array(rows[-1]["kl/sequence"])
    assert np.ptp(first[0]) < 1e-6 < abs(first[0, 0] - first[1, 0])
    assert len(set(last[0].tolist())) == 8


@pytest.mark.parametrize(("seed", "point"), [(0, 2), (1, 7)])
def test_a_point_is_the_single_run_of_its_config(eight, directory, tmp_path, seed, point):
    """With the code of single runs: the same tokens, so the same rewards and counts, and parameters within 1e-5."""
    config = tiny_config(**CHANGES, seed=SEEDS[seed], objective__beta=BETAS[point])
    setup = make_setup(config, *validate(config, num_devices=1), devices=jax.devices()[:1])
    run = Run(config, setup, tmp_path, quiet(), None, jax.random.key(SEEDS[seed]), [])
    before = measured_reference(run)
    assert before == read_sealed(directory / "eight" / f"seed-{SEEDS[seed]}" / "reference.json")
    params, _ = run_iterations(run, reference_params(run), before, Foretold([], [], None, None, "not asked for"))

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["phase"] == "train"]
    for row, of_all in zip(rows, eight[1], strict=True):
        for name in ("reward/mean", "rollout/length", "rollout/truncated"):
            assert row[name] == of_all[name][seed][point], (name, row["iteration"])
        np.testing.assert_allclose(row["loss/grad_norm"], of_all["loss/grad_norm"][seed][point], rtol=1e-3)
    states = last_states(directory / "eight", config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[seed, point], b, atol=1e-5), states.params, params)
    found, of_all = measure(run, params, reference_params(run), 5, samples=16), eight[0][seed * 8 + point]
    np.testing.assert_array_equal(found.successes, np.array(of_all["prompts"]["p_final"]) * 16)
    ledger = ledger_of_run(config, setup.recipe.objective, before, found.tally())
    assert of_all["after"]["kl"] == pytest.approx(found.kl, abs=1e-4)
    for name, interval in ledger.means.items():
        assert of_all["ledger"][name] == pytest.approx(interval, abs=1e-3), name


def last_states(path, config):
    setup = make_setup(config, *validate(config, num_devices=1), devices=jax.devices()[:1])
    functions = make_sweep_functions(setup.recipe, make_sweep_mesh(8), batch_samples=8, batched=False)
    refs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), setup.shapes)
    like = jax.eval_shape(functions.start, refs, jax.ShapeDtypeStruct((2, 8), "float32"))
    shardings = NamedSharding(make_sweep_mesh(8), POINTS)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings), like)
    checkpoints = sweep_module.Checkpoints(path / "checkpoints", keep=None)
    step, states, _ = checkpoints.restore_latest(like)
    checkpoints.close()
    assert step == 5
    return states


def test_one_device_and_eight(eight, tmp_path):
    results, rows = swept(tmp_path / "one", devices=jax.devices()[:1])
    same_metrics(rows, eight[1], atol=1e-5)
    same_prompts(results, eight[0])


def test_all_at_once_and_one_after_the_other(eight, tmp_path):
    """vmap, with its loops in step, and lax.map."""
    results, rows = swept(tmp_path / "batched", batched=True)
    same_metrics(rows, eight[1], atol=1e-4)
    same_prompts(results, eight[0])


def test_each_device_holds_its_points_and_runs_them_alone():
    config = tiny_config(**CHANGES)
    setup = make_setup(config, *validate(config, num_devices=1), devices=jax.devices()[:1])
    mesh = make_sweep_mesh(8)
    functions = make_sweep_functions(setup.recipe, mesh, batch_samples=8, batched=False)
    params = setup.initial_params(0)
    refs = jax.device_put(jax.tree.map(lambda x: np.stack([x, x]), params), NamedSharding(mesh, WHOLE))
    betas = jnp.ones((2, 8))
    states = functions.start(refs, betas)
    for leaf in jax.tree.leaves(states):
        shards = leaf.addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert all(shard.data.shape == (2, 1, *leaf.shape[2:]) for shard in shards)
    keys, index = jax.random.split(jax.random.key(0), 2), np.zeros((2, 2, 8), np.int32)
    table = jax.device_put(put_table(setup), NamedSharding(mesh, WHOLE))
    numbers = table, jnp.int32(2), jnp.int32(1), betas, betas
    text = functions.iterate.lower(states, refs, keys, index, *numbers).compile().as_text()
    for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {name}(" not in text


def test_as_many_devices_as_divide_the_points():
    for points, size in ((8, 8), (16, 8), (12, 6), (7, 7), (3, 3), (11, 1)):
        assert make_sweep_mesh(points).shape["sweep"] == size


def test_killed_between_checkpoints_and_resumed_is_the_unbroken_sweep(eight, directory, tmp_path, monkeypatch):
    """Rows beyond the checkpoint are on disk when it dies; and once more by SIGTERM."""
    save, saved = sweep_module.Checkpoints.save, []

    def dies(self, step, *arguments):
        if step == 5:
            raise KeyboardInterrupt
        save(self, step, *arguments)
        saved.append(step)

    def signalled(*arguments):
        signals.append(15)
        return stretch(*arguments)

    path, signals, stretch = tmp_path / "killed", [], sweep_module.stretch
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "signals_as_flag", lambda: nullcontext(signals))
        patch.setattr(sweep_module, "stretch", signalled)
        with pytest.raises(Preempted):
            swept(path)
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module.Checkpoints, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            swept(path)
    assert saved == [3]
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 5
    # By SIGTERM in the measurement of the end, whose first batch of two is kept.
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "signals_as_flag", lambda: nullcontext([15]))
        with pytest.raises(Preempted):
            swept(path)
    begun, progress = [], sweep_module.progress
    monkeypatch.setattr(sweep_module, "progress", lambda *a, **k: (begun.append(k["done"]), progress(*a, **k))[1])
    results, _ = swept(path)
    assert begun == [5, 8] and not list(path.glob("measuring-*"))
    assert results == eight[0]
    assert (path / "metrics.jsonl").read_bytes() == (directory / "eight" / "metrics.jsonl").read_bytes()
    assert swept(path)[0] == results  # it is finished, and only read


def test_without_a_reference_points_differ_by_learning_rate(tmp_path):
    rates = (1e-2, 1e-3)
    changes = {"objective__name": "DAPO", "objective__beta": 0.0, "train__average": 1.0}
    results, rows = swept(tmp_path / "dapo", seeds=(0,), betas=(0.0,), learning_rates=rates, **changes)
    assert [r["learning_rate"] for r in results] == list(rates)
    norms = np.array([row["loss/grad_norm"] for row in rows])
    assert norms[0, 0, 0] == pytest.approx(norms[0, 0, 1], rel=1e-6)
    assert "kl/sequence" not in rows[0]
    assert "p_star" not in results[0]
    # Averaged over all five iterations, each point for itself.
    assert [r["average"]["iterations"] for r in results] == [5, 5]
    for result in results:
        assert result["average"]["p_final"]["mean"] == pytest.approx(np.mean(result["prompts"]["p_average"]))
    assert results[0]["prompts"]["p_average"] not in (
        results[0]["prompts"]["p_final"],
        results[1]["prompts"]["p_average"],
    )


def test_what_cannot_be_swept_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.beta=0\.0 must be positive"):
        swept(tmp_path, betas=(1.0, 0.0))
    with pytest.raises(ValueError, match="none of them twice"):
        swept(tmp_path, betas=(1.0, 1.0))
    with pytest.raises(ValueError, match="at least one seed"):
        swept(tmp_path, seeds=())
    with pytest.raises(ConfigError, match="1 device"):
        swept(tmp_path, mesh__data=2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"verifier on the device: launch\.py --sweep"):
        swept(tmp_path / "host", model__stop_strings=("1",))


def test_another_sweep_in_the_same_directory_is_refused(eight, directory):
    with pytest.raises(RunDirectoryError, match=r"objective\.beta"):
        swept(directory / "eight", betas=BETAS[:4])

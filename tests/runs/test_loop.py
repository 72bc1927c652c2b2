"""The jitted pieces of a run on a mesh, several iterations as one program, and runs that keep no reference."""

import json
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import validate
from grpo_jax.files import write_json
from grpo_jax.runs.directory import REFERENCE
from grpo_jax.runs.errors import Diverged, Preempted
from grpo_jax.runs.loop import stretch, train, visits
from grpo_jax.runs.memory import held_memory
from grpo_jax.runs.setup import make_program, put_prompts
from grpo_jax.train.iteration import role_key
from tests.tiny_run import tiny_config

MESHES = ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})
QUICK = {"warm_start__target": 0.01, "warm_start__interval": 1, "warm_start__samples": 8}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quiet():
    return Console(quiet=True)


@cache
def on_one_device(**changes):
    config = tiny_config(mesh__data=1, **changes)
    return config, make_program(config, *validate(config, num_devices=1), devices=jax.devices()[:1])


def on_mesh(mesh, **changes):
    config = tiny_config(**{f"mesh__{k}": v for k, v in mesh.items()}, **changes)
    return config, make_program(config, *validate(config, num_devices=8))


def drawn(program, rows=16, **options):
    params, prompts = program.initial_params(0), put_prompts(program, np.arange(rows))[0]
    if options:
        return program.functions.draw(params, prompts, jax.random.key(5), **options)
    return program.functions.sample(params, prompts, jax.random.key(5))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_same_tokens_on_any_mesh(mesh):
    _, program = on_mesh(mesh)
    one = on_one_device()[1]
    wanted, found = drawn(one), drawn(program)
    for field in ("completions", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(found, field), getattr(wanted, field), err_msg=field)
    np.testing.assert_allclose(found.logps, wanted.logps, atol=1e-5)
    assert len(found.completions.sharding.device_set) == 8
    lengths = np.asarray(wanted.mask).sum(-1)
    assert lengths.min() < lengths.max()
    by_device = lengths.reshape(
        mesh.get("data", 1) * mesh.get("fsdp", 1), -1
    )  # each decodes until its longest has ended
    np.testing.assert_allclose(found.useful, lengths.sum() / (by_device.shape[1] * by_device.max(1)).sum(), rtol=1e-6)
    # For probes: other sizes, and a number of prompts that the devices do not divide.
    options = {"group_size": 3, "greedy": False, "first_sample": jnp.int32(4)}
    for rows in (16, 5):
        wanted, found = (drawn(p, rows=rows, **options) for p in (one, program))
        np.testing.assert_array_equal(found.completions, wanted.completions)


def test_every_device_decodes_its_own_rows_without_talking():
    """With prompts over all devices there is one gathering of what fsdp spreads, before the loop, and nothing inside it."""
    _, program = on_mesh({"data": 4, "fsdp": 2})
    params, prompts = program.initial_params(0), put_prompts(program, np.arange(16))[0]
    text = program.functions.sample.lower(params, prompts, jax.random.key(0)).compile().as_text()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    computations = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
    entry = next(c for c in computations if c.startswith("ENTRY"))
    assert "all-gather" in entry
    inside = [c.splitlines()[0] for c in computations if c is not entry for name in collectives if f" {name}(" in c]
    assert not inside


@pytest.mark.slow
def test_iterations_are_the_same_on_any_mesh():
    """Three iterations as one program, on one device and on eight: same tokens, so the same metrics and parameters."""

    def run(config, program):
        f, prompts = program.functions, program.prompts
        state, reference = apart(program)
        index = visits(config, 16, 0, 3)
        beta, rate = jnp.float32(1.0), jnp.float32(1e-2)
        numbers = jnp.int32(3), jax.random.key(7), jnp.int32(1)
        return f.iterate(state, reference, prompts, index, *numbers, beta, rate)

    state, metrics, skipped = run(*on_one_device())
    assert index_of_last(metrics["loss/grad_norm"]) == 2
    assert skipped.shape == (10,)
    for mesh in MESHES[:2]:
        other, others, _ = run(*on_mesh(mesh))
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3)  # noqa: E731
        jax.tree.map(close, other.params, state.params)
        for name in ("reward/mean", "rollout/length", "rollout/truncated"):
            np.testing.assert_allclose(others[name], metrics[name], atol=1e-6, err_msg=name)


def apart(program):
    """(state, reference) of a policy that has left its reference, so that there is a gradient where nothing succeeds."""
    params = program.initial_params(0)
    return program.functions.start(params), jax.tree.map(lambda x: 1.2 * x, params)


def index_of_last(values):
    return int(np.flatnonzero(np.asarray(values))[-1])


def test_the_program_is_the_halves_one_after_the_other():
    """What one program does for several iterations, the two halves do with the host between them."""
    config, program = on_one_device()
    f, (state, params) = program.functions, apart(program)
    beta, rate, base = jnp.float32(0.7), jnp.float32(1e-2), jax.random.key(3)
    index = visits(config, 16, 0, 2)
    whole, metrics, _ = f.iterate(
        jax.tree.map(jnp.copy, state), params, program.prompts, index, jnp.int32(2), base, jnp.int32(1), beta, rate
    )
    for n in (1, 2):
        prompts, answers, answer_mask = put_prompts(program, index[n - 1])
        rollout = f.sample(state.params, prompts, role_key(base, "rollout", n))
        rewards = jnp.asarray(f.grade(rollout, answers, answer_mask), jnp.float32)
        key = role_key(base, "minibatches", n)
        state, row = f.improve(state, params, prompts, rollout, rewards, key, beta, rate)
        np.testing.assert_allclose(row["reward/mean"], metrics["reward/mean"][n - 1])
        np.testing.assert_allclose(row["loss/grad_norm"], metrics["loss/grad_norm"][n - 1], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, state.params)
    assert int(whole.updates) == 2
    assert not np.asarray(metrics["rollout/length"])[2:].any()


def test_beta_and_the_learning_rate_are_data():
    """One compilation serves them all, and each decides the outcome."""
    config, program = on_one_device()
    f, (start, reference) = program.functions, apart(program)
    index, results, norms = visits(config, 16, 0, 2), [], []
    f.iterate.clear_cache()
    for beta, rate in ((1.0, 1e-2), (5.0, 1e-2), (1.0, 1e-3)):
        arguments = reference, program.prompts, index, jnp.int32(2), jax.random.key(3), jnp.int32(1)
        state, metrics, _ = f.iterate(jax.tree.map(jnp.copy, start), *arguments, jnp.float32(beta), jnp.float32(rate))
        norms.append(float(metrics["loss/grad_norm"][0]))
        results.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]))
    assert f.iterate._cache_size() == 1
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(start.params)])
    moved = [np.abs(r - start).max() for r in results]
    assert norms[1] == pytest.approx(5 * norms[0], rel=1e-4)  # nothing succeeds: the gradient is that of the KL alone
    assert moved[2] == pytest.approx(moved[0] / 10, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((7, 3, 2, 10), [2, 1, 1, 2, 1]),
        ((7, 100, 100, 3), [3, 3, 1]),
        ((4, 1, 9, 10), [1] * 4),
        ((5, 9, 9, 1), [1] * 5),
    ],
)
def test_a_program_ends_where_the_host_is_needed(sizes, wanted):
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
def one_by_one(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "one", train__iterations_per_program=1)


def test_the_rows_are_the_same_however_many_iterations_a_program_holds(one_by_one, tmp_path):
    result, rows, written = one_by_one
    assert [r["iteration"] for r in rows if r["phase"] == "train"] == list(range(1, 8))
    assert [r["iteration"] for r in rows if r["phase"] == "probe"] == [0, 3, 6]
    for number in (2, 10):
        found, _, text = finished(tmp_path / str(number), train__iterations_per_program=number)
        assert text == written, number
        assert found == result


def test_a_run_that_is_stopped_within_a_program_goes_on_behind_it(one_by_one, tmp_path, monkeypatch):
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
    *_, text = finished(tmp_path / "run", **changes)
    assert text == one_by_one[2]
    assert len(calls) == 2  # iterations 1 and 2, then 3, which ends at a probe


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
    config, program = on_one_device(**changes)
    held = held_memory(config, program.objective, program.shapes, program.mesh)
    assert list(held) == ["parameters", "optimizer"]
    kept = on_one_device()
    assert list(held_memory(kept[0], kept[1].objective, kept[1].shapes, kept[1].mesh)) == [*held, "reference"]
    # Its start takes the memory of the parameters it is given; with a reference it must not.
    for each, freed in ((program, True), (kept[1], False)):
        params = each.initial_params(0)
        each.functions.start(params)
        assert all(x.is_deleted() == freed for x in jax.tree.leaves(params))


def test_a_stop_string_stays_in_the_text(tmp_path):
    """It is part of what the model wrote; a stop token is not. With several ways to end, text is judged."""
    from grpo_jax.runs.measurement import decode

    program = on_one_device(model__stop_strings=("1",))[1]
    assert program.functions.grade is None
    rollout = drawn(program)
    texts, mask = decode(program, rollout), np.asarray(rollout.mask).reshape(-1, 3)
    last = np.asarray(rollout.completions).reshape(-1, 3)[np.arange(len(mask)), mask.sum(-1) - 1]
    truncated = np.asarray(rollout.truncated).reshape(-1).tolist()
    for text, token, cut in zip(texts, last.tolist(), truncated, strict=True):
        assert text.endswith("1") == (not cut and token not in program.stop_ids), text
        assert "1" not in text[:-1]
    assert {text.endswith("1") for text in texts} == set(truncated) == {True, False}


@pytest.mark.slow
def test_a_reference_that_was_made_is_not_made_again(tmp_path):
    """Its measurement and its parameters are both on disk, each is read by itself."""
    config = tiny_config(mesh__data=8, **QUICK)
    train(config, tmp_path / "run", quiet())
    stored = json.loads((tmp_path / "run" / REFERENCE).read_text())
    (tmp_path / "run" / "result.json").unlink()
    write_json(tmp_path / "run" / REFERENCE, stored | {"marked": True})
    train(config, tmp_path / "run", quiet())
    assert json.loads((tmp_path / "run" / REFERENCE).read_text())["marked"]

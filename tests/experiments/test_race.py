"""The benchmarks compare equal work, and the check of their ratios tells a regression from noise."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import cases, check, plain, race
from grpo_jax.models import make_policy

ROOT = Path(__file__).resolve().parent.parent.parent
CASE = cases.quick(cases.Case("update", 1024, True))
PROGRAM = """
import json, sys, time
request = json.loads(sys.stdin.readline())
print(json.dumps({"versions": {}, "check": [request["width"], %s]}), flush=True)
for number, _ in enumerate(sys.stdin):
    time.sleep(%s)
    print(json.dumps({"tokens": 10, "compiled": number < 1}), flush=True)
"""


def form(name, *, number=1.0, seconds=0.0, program=PROGRAM):
    return race.Form(name, (sys.executable, "-c", program % (number, seconds) if "%s" in program else program))


@pytest.fixture(scope="module")
def loose():
    """What plain code in JAX takes for granted."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory, loose):
    return (request := cases.write(CASE, tmp_path_factory.mktemp("case"))), *plain.load(request)


def test_a_race_measures_each_form_where_it_compiles_nothing():
    rows = race.race(CASE, [form("ours", seconds=0.2), form("plain", seconds=0.6)], repeats=3)
    assert [row["form"] for row in rows] == ["ours", "plain"]
    for row, least in zip(rows, (0.2, 0.6), strict=True):
        seconds = row["seconds"]
        assert least <= seconds["low"] <= seconds["median"] <= seconds["high"]
        assert row["tokens_per_second"] == pytest.approx(10 / seconds["median"])
        assert row["compile_cold"] >= 0 and row["compile_cached"] >= 0
    assert race.ratios(rows)["plain"] > 1.2
    assert "| ours |" in race.table(rows) and "| plain |" in race.table(rows)


def test_forms_that_compute_something_else_are_not_timed():
    with pytest.raises(ValueError, match=r"plain computes .* not the same work"):
        race.race(CASE, [form("ours"), form("plain", number=1.0002)], repeats=1)


def test_a_form_that_dies_is_named_with_its_last_words():
    with pytest.raises(RuntimeError, match=r"(?s)ours died:.*no such peer"):
        race.race(CASE, [form("ours", program="raise SystemExit('no such peer')")], repeats=1)
    with pytest.raises(RuntimeError, match="still compiles"):
        race.race(CASE, [form("ours", program=PROGRAM.replace("number < 1", "True") % (1, 0))], repeats=1)


def test_the_check_fails_on_a_regression_and_passes_on_noise():
    baseline = {"update fixed 1024": {"plain": 2.0}}
    measured = iter([1.0, 2.1, 0.1])
    assert check.regressions(baseline, lambda _: {"plain": next(measured)}) == {}
    assert next(measured) == 0.1  # once good, it is not measured again
    assert check.regressions(baseline, lambda _: {"plain": 2.0 / 1.19}) == {}
    measured = iter([1.0, 1.6, 1.2])
    found = check.regressions(baseline, lambda _: {"plain": next(measured), "TRL": 0.0})
    assert found == {"update fixed 1024": {"plain": (2.0, 1.6)}}
    assert check.regressions({"update fixed 1024": {"TRL": 9.0}}, lambda _: {"plain": 1.0}) == {}  # not here


@pytest.mark.parametrize(("ratio", "code"), [(0.5, 1), (3.0, 0)])
def test_the_command_exits_with_one_on_a_regression(tmp_path, ratio, code):
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"quick": {"update fixed 1024": {"plain": 1.0}}}), encoding="utf-8")
    row = {
        "compile_cold": 0,
        "compile_cached": 0,
        "tokens_per_second": 1,
        "peak_mib": None,
        "cpu_seconds": {"median": 1},
    }
    program = f"""
import sys, pathlib, runpy
from experiments.benchmarks import race
seconds = {{"ours": 1.0, "plain": {ratio}}}
race.race = lambda *_: [{row} | {{"form": f, "seconds": dict(median=s, low=s, high=s)}} for f, s in seconds.items()]
read = pathlib.Path.with_name
pathlib.Path.with_name = lambda p, name: pathlib.Path({str(baseline)!r}) if name == "baseline.json" else read(p, name)
sys.argv = ["check", "--quick"]
runpy.run_module("experiments.benchmarks.check", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert "plain takes 0.50 × our time, and took 1.00 × in the baseline" in done.stderr


def test_ragged_completions_end_after_their_mean_length_and_fixed_ones_never():
    for ragged, expected in ((True, 1 / CASE.mean_length), (False, 0.0)):
        case = CASE._replace(ragged=ragged)
        weights = cases._weights(case, *sequences(case))
        params = {"layers": {}}
        for name, value in weights.items():
            (params["layers"] if "/" in name else params)[name.removeprefix("layers/")] = jnp.array(value)
        policy = make_policy(cases.decoder(case))
        tokens = jax.random.randint(jax.random.key(5), (16, 48), 2, case.vocabulary)
        positions = jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32)[None], tokens.shape)
        hidden, _ = policy.forward(params, tokens, positions, tokens > 0)
        share = jax.nn.softmax(policy.unembed(params, hidden))[:, 16:, cases.EOS].mean()
        assert float(share) == pytest.approx(expected, rel=0.25, abs=1e-9)


def sequences(case):
    generator = np.random.default_rng(7)
    rows = case.prompts * case.group
    return (generator.integers(2, case.vocabulary, (rows, n), np.int32) for n in (case.prompt_length, case.completion))


@pytest.mark.parametrize("compact", [False, True])
def test_the_yardstick_samples_what_it_says(given, loose, compact, monkeypatch):
    monkeypatch.setattr(plain, "FEWEST_ROWS", 2)
    _, params, data = given
    options = {"group": 4, "length": CASE.completion, "head_dim": CASE.head_dim, "eos": cases.EOS}
    lengths = []
    for seed in range(8):
        out = plain.sample(params, data["prompts"], jax.random.key(seed), **options, compact=compact)
        tokens, mask, logps = (np.array(x) for x in out)
        lengths += mask.sum(1).tolist()
        text = jnp.concatenate([jnp.repeat(data["prompts"], 4, 0), tokens], 1)
        positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
        causal = jnp.tril(jnp.ones((text.shape[1],) * 2, bool))
        hidden, _ = plain.whole(params, text, positions, causal, CASE.head_dim)
        scores = jax.nn.log_softmax(hidden @ params["embedding"].T).reshape(*text.shape, -1)[
            :, CASE.prompt_length - 1 : -1
        ]
        again = np.take_along_axis(np.array(scores), tokens[..., None], 2)[..., 0]
        np.testing.assert_allclose(logps, np.where(mask, again, 0.0), atol=2e-4)
        ended = (tokens == cases.EOS) & mask
        assert (mask.sum(1) == np.where(ended.any(1), ended.argmax(1) + 1, CASE.completion)).all()
    expected = (1 - (1 - 1 / CASE.mean_length) ** CASE.completion) * CASE.mean_length
    assert abs(np.mean(lengths) - expected) < 4 * np.std(lengths) / len(lengths) ** 0.5 + 1.0


def test_the_yardstick_packs_without_changing_the_gradient(given, loose):
    _, params, data = given
    arrays = [np.array(data[name]) for name in ("prompts", "completions", "mask")]
    advantages = plain.normalise(np.array(data["rewards"]))
    batches = [plain.pack(*arrays, advantages, packed=packed) for packed in (True, False)]
    assert batches[0]["tokens"].shape[0] < batches[1]["tokens"].shape[0]
    assert batches[0]["weight"].sum() == batches[1]["weight"].sum() == arrays[2].sum()
    norms = [float(plain.learn(plain.init(params), batch, head_dim=CASE.head_dim)[1]) for batch in batches]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["update", "iteration"])
def test_the_commands_race_ours_against_the_yardstick(tmp_path, work):
    command = [sys.executable, "-m", f"experiments.benchmarks.{work}", "--quick", "--vocabularies=1024"]
    command += ["--lengths=ragged", f"--out={tmp_path}", "--forms=ours,plain"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / f"{work}.json").read_text(encoding="utf-8"))["rows"]
    assert [row["form"] for row in rows] == ["ours", "plain"]
    assert all(row["tokens"] > 0 and row["seconds"]["median"] > 0 for row in rows)


def test_examples():
    assert sum(doctest.testmod(module).failed for module in (cases, check, race)) == 0

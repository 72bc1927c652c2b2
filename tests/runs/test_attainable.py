"""What a network lets through, measured at the start of a run: sizes, what is refused, what is stored and shown."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from grpo_jax.config import ConfigError, validate
from grpo_jax.objective import GRPO, GRPO_TRL, named_objective
from grpo_jax.runs import attainable
from grpo_jax.runs.attainable import refusal, sizes
from grpo_jax.runs.errors import Preempted
from grpo_jax.runs.loop import train
from grpo_jax.runs.run import Run
from grpo_jax.runs.setup import make_setup
from tests.tiny_run import tiny_config

QUICK = {
    "mesh__data": 8,
    "attainable__steps": 2,
    "warm_start__target": 0.1,
    "train__iterations": 1,
    "evaluate__interval": 1,
}


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(path, **changes):
    """(result, attainable.json, what was printed) of a tiny run."""
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    result = train(tiny_config(**(QUICK | changes)), path, console)
    return result, json.loads((path / "attainable.json").read_text()), console.export_text()


def test_a_run_measures_it_once_and_shows_p_dagger_beside_p_star(tmp_path, monkeypatch):
    result, measured, printed = run(tmp_path / "a", attainable__samples=96)
    assert (measured["samples"], measured["steps"], measured["of"]) == (96, 2, 16)
    assert measured["prompts"] == list(range(16))
    assert len(measured["shares"]) == 16
    assert 0 < measured["r2"]["low"] < measured["r2"]["mean"] < measured["r2"]["high"] <= 1
    assert measured["naive"] < measured["r2"]["mean"]
    expected = result["attainable"]
    assert result["p_ref"]["mean"] - 0.02 < expected["low"] < expected["mean"] < expected["high"]
    assert expected["mean"] < result["p_star"]["high"]
    assert len(result["prompts"]["attainable"]) == 16
    assert "attainable p†" in printed
    assert "at least, from 96 samples of each prompt" in printed
    assert "attainable p†" in (tmp_path / "a" / "report.md").read_text()
    # The same bits in another run, and the iterations do not know of it.
    other, again, _ = run(tmp_path / "b", attainable__samples=96)
    assert again == measured
    without, left_out, printed = run(tmp_path / "c", attainable__steps=0)
    assert left_out["reason"] == "attainable.steps is 0"
    assert "not measured: attainable.steps is 0" in printed
    assert without["p_final"] == other["p_final"] == result["p_final"]

    # A later start reads it; one with other settings, and one that finds it torn, measure again.
    (tmp_path / "a" / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(attainable, "explained_share", None)
        assert run(tmp_path / "a", attainable__samples=96)[0] == result
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "attainable.json").write_text('{"r2": {"me')
    assert run(tmp_path / "a", attainable__samples=96)[:2] == (result, measured)
    (tmp_path / "a" / "result.json").unlink()
    assert run(tmp_path / "a", attainable__steps=0)[1]["reason"] == "attainable.steps is 0"


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate__batch_samples": 1, "attainable__samples": None},
        {"data__prompts_per_iteration": 8, "evaluate__prompts": 11},  # a last batch that is smaller
        # With fsdp and tensor together, whose decode loops once waited for each other for ever.
        {"model__dtype": "bfloat16", "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "model__num_kv_heads": 2},
    ],
)
def test_sizes_and_types_of_all_kinds_are_measured(tmp_path, changes):
    _, measured, _ = run(tmp_path / "a", **({"attainable__samples": 24} | changes))
    assert "reason" not in measured
    assert np.isfinite(measured["naive"])


@pytest.mark.parametrize("broken", ["no success in a part", "not finite", "no change"])
def test_what_cannot_be_measured_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, broken):
    if broken == "no success in a part":
        sample = attainable._sample
        monkeypatch.setattr(
            attainable, "_sample", lambda *a: (part := sample(*a))._replace(pull=part.pull * (a[-2] != 1))
        )
    else:
        value = np.nan if broken == "not finite" else 0.0
        made = attainable.Scores.__init__

        def init(self, run, params):
            made(self, run, params)
            self.programs = self.programs._replace(along=lambda *a: np.full(a[-1].mask.shape[:2], value))

        monkeypatch.setattr(attainable.Scores, "__init__", init)
    result, measured, printed = run(tmp_path / "a", attainable__samples=12)
    words = (
        "no prompt both succeeded and failed" if broken == "no success in a part" else "no step along the parameters"
    )
    assert words in measured["reason"]
    assert words in " ".join(printed.split())
    assert "attainable" not in result
    assert result["p_final"]["mean"] > 0


def test_enough_steps_explain_all_samples_of_a_part(tmp_path, monkeypatch):
    """With fewer samples than parameters, the least-squares fit that the steps go to is exact on its own part."""
    explained = []
    advance = attainable._advance

    def watched(scores, part, factors, fit):
        found = advance(scores, part, factors, fit)
        if found.step == 20:
            explained.append(found.share(part))
        return found

    monkeypatch.setattr(attainable, "_advance", watched)
    run(tmp_path / "a", attainable__samples=12, attainable__steps=20)
    assert len(explained) == 3
    assert min(explained) > 0.85  # differences are rounded, and so are conjugate directions


def test_stopped_after_any_step_it_goes_on_from_there(tmp_path, monkeypatch):
    """Each start takes one step of one fit, keeps it and stops; in the end R² has the bits of an unbroken one."""
    config = tiny_config(**QUICK | {"attainable__samples": 384})
    setup = make_setup(config, *validate(config, num_devices=8))
    params, before = setup.initial_params(0), {"successes": [3] * 16, "trials": 16}
    for name in "ab":
        (tmp_path / name).mkdir()
    a_run = Run(config, setup, tmp_path / "a", Console(quiet=True), None, jax.random.key(0), [])
    whole = attainable.measured_attainable(a_run, params, before)
    assert "r2" in whole
    stopped, steps, advance = a_run._replace(directory=tmp_path / "b", signals=[15]), [], attainable._advance
    monkeypatch.setattr(attainable, "_advance", lambda *a: (steps.append(a[-1].step), advance(*a))[1])
    for _ in range(6):  # two steps on each of three parts
        with pytest.raises(Preempted):
            attainable.measured_attainable(stopped, params, before)
    assert len(list((tmp_path / "b").glob("measuring-*"))) == 1
    # What was kept is of this policy: another begins anew.
    other = jax.tree.map(lambda x: 1.01 * x, params)
    with pytest.raises(Preempted):
        attainable.measured_attainable(stopped, other, before)
    assert steps == [0, 1, 0, 1, 0, 1, 0]
    assert attainable.measured_attainable(stopped._replace(signals=[]), params, before) == whole
    assert steps == [0, 1, 0, 1, 0, 1, 0]
    assert not list((tmp_path / "b").glob("measuring-*"))


def test_it_costs_what_it_says(tmp_path, monkeypatch):
    """Gradients and scorings are counted, in completions: what `sizes` assumes is what is run, but for a few corrections."""
    counted = {"pull_back": 0, "along": 0}
    made = attainable.Scores.__init__

    def init(self, run, params):
        made(self, run, params)

        def counting(name):
            program = getattr(self.programs, name)

            def call(*arguments):
                rollout = next(x for x in arguments if hasattr(x, "truncated"))
                counted[name] += rollout.truncated.size
                return program(*arguments)

            return call

        self.programs = self.programs._replace(**{name: counting(name) for name in counted})

    monkeypatch.setattr(attainable.Scores, "__init__", init)
    run(tmp_path / "a", attainable__samples=96, attainable__steps=3)
    completions = 16 * 96
    assert counted["pull_back"] <= completions * (3 + 4 / 3)
    assert completions * (3 + 2) <= counted["along"] <= 1.35 * completions * (3 + 2)


def test_many_prompts_cost_no_more_than_thirty_iterations():
    config = tiny_config(
        data__prompts_per_iteration=8, rollout__group_size=8, attainable__steps=4, evaluate__batch_samples=64
    )
    assert sizes(config, 1) == (1, 64)  # a whole batch
    assert sizes(config, 16) == (16, 6)
    assert sizes(config, 5000) == (27, 4)
    for batch, wanted in ((1, 6), (4, 4), (64, 6)):
        with config.unlocked():
            config.evaluate.batch_samples = batch
        assert sizes(config, 16)[1] == wanted
    with config.unlocked():
        config.evaluate.batch_samples = 3
    assert sizes(config, 5000)[1] == 6  # whole batches, four samples at least
    with config.unlocked(), config.ignore_type():
        config.attainable.samples = 48
    assert sizes(config, 5000) == (5000, 16)


@pytest.mark.parametrize(
    ("objective", "successes", "changes", "reason"),
    [
        (GRPO, [0, 0, 16], {}, "0 of 3 prompts were solved sometimes"),
        (GRPO, [0, 3, 16], {}, "1 of 3 prompts"),
        (GRPO_TRL, [3, 4, 5], {}, "knows no p†"),
        (named_objective("DAPO"), [3, 4, 5], {}, "knows no p†"),
        (GRPO, [3, 4, 5], {"objective__entropy_bonus": 0.1}, "knows no p†"),
        (GRPO, [3, 4, 5], {}, None),
    ],
)
def test_it_is_left_out_with_the_reason(objective, successes, changes, reason):
    found = refusal(tiny_config(attainable__steps=2, **changes), objective, {"successes": successes, "trials": 16})
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("samples", "message"),
    [(6, "at least 12"), (25, "multiple of 3"), (51, "a third is more than evaluate.batch_samples=8")],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_compiled(samples, message):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(mesh__data=1, attainable__samples=samples), num_devices=1)


def test_nothing_found_says_how_many_samples_may_do(tmp_path, monkeypatch):
    monkeypatch.setattr(attainable, "explained_share", lambda *_: attainable_zero())
    result, measured, printed = run(tmp_path / "a", attainable__samples=12)
    assert measured["needed"] == 48
    assert "about 48 of each may do" in printed
    validate(tiny_config(mesh__data=1, attainable__samples=48), num_devices=1)  # what is advised is accepted
    assert "attainable" not in result


def attainable_zero():
    from grpo_jax.theory import Explained

    return Explained(0.0, 0.0, 0.1, np.zeros(16), -0.5)

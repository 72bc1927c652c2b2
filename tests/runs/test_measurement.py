"""Measuring a policy: the same samples however they are cut into batches, the verdicts of both verifiers, and the texts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax.runs import measurement
from grpo_jax.runs.errors import Preempted, VerifierFailed
from grpo_jax.runs.measurement import check_verifier, decode, drop_counts, judged_samples, measure, measure_in_full
from grpo_jax.runs.run import Run
from grpo_jax.runs.setup import put_prompts
from grpo_jax.tasks import Verdict
from grpo_jax.tasks.task import Task
from tests.tiny_run import on_one_device


class Pool:
    """A pool that judges in this process."""

    def __init__(self, task: Task):
        self.task, self.first_crash = task, None

    def verify(self, texts, targets, truncated):
        return [self.task.verify(*line) for line in zip(texts, targets, truncated, strict=True)]


def run_of(tmp_path, pool=False, **changes):
    config, setup = on_one_device(**changes)
    console = SimpleNamespace(print=lambda *a, **k: None)
    return Run(config, setup, tmp_path, console, Pool(setup.task) if pool else None, jax.random.key(0), [])


def sampled(setup):
    params, prompts = setup.initial_params(0), put_prompts(setup, np.arange(16))[0]
    return setup.compiled.sample(params, prompts, jax.random.key(5))


def test_a_stop_string_stays_in_the_text():
    """It is part of what the model wrote; a stop token is not. With several ways to end, text is judged."""
    setup = on_one_device(model__stop_strings=("1",))[1]
    assert setup.compiled.verify is None
    rollout = sampled(setup)
    completions, mask = np.asarray(rollout.completions), np.asarray(rollout.mask)
    texts, mask = decode(setup, completions, mask), mask.reshape(-1, 3)
    last = completions.reshape(-1, 3)[np.arange(len(mask)), mask.sum(-1) - 1]
    truncated = np.asarray(rollout.truncated).reshape(-1).tolist()
    for text, token, cut in zip(texts, last.tolist(), truncated, strict=True):
        assert text.endswith("1") == (not cut and token not in setup.stop_ids), text
        assert "1" not in text[:-1]
    assert {text.endswith("1") for text in texts} == set(truncated) == {True, False}


def moved(params):
    """A policy that has left its reference."""
    return jax.tree.map(lambda x: 1.2 * x, params)


def test_batches_change_no_count(tmp_path):
    """All at once, or in batches that neither the prompts nor the samples divide evenly into."""
    run = run_of(tmp_path)
    params = run.setup.initial_params(0)
    whole = measure(run, moved(params), params, 3, samples=12, batch_samples=12)
    run.config.unlock().data.prompts_per_iteration = 7
    parts = measure(run, moved(params), params, 3, samples=12, batch_samples=4)
    run.config.data.prompts_per_iteration = 8
    np.testing.assert_array_equal(parts.successes, whole.successes)
    assert (parts.length, parts.truncated, parts.trials) == (whole.length, whole.truncated, 12)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-5) and whole.kl != 0.0
    other = measure(run, moved(params), params, 4, samples=12, batch_samples=12)
    assert other.length != whole.length  # another iteration, other samples


def test_kl_is_measured_against_another_policy_alone(tmp_path):
    run = run_of(tmp_path)
    params = run.setup.initial_params(0)
    assert measure(run, params, None, 0, samples=2).kl is None
    assert measure(run, params, params, 0, samples=2).kl == 0.0
    recorded, tally = measure_in_full(run, moved(params), params, 0)
    assert recorded["kl"] != 0.0 and 0.0 <= recorded["greedy"] <= 1.0
    assert len(recorded["successes"]) == 16 and len(recorded["examples"]) == 2
    assert tally.successes.tolist() == recorded["successes"] and tally.log_ratio_sums.shape == (16, 2, 4)
    assert all(len(example["completions"]) == 4 for example in recorded["examples"])


def test_the_host_judges_as_the_device_does(tmp_path):
    """Where both verify, the reward is the device's, and the verdicts on the texts agree with it."""
    run = run_of(tmp_path, pool=True, task__arithmetic__operand_max=1, data__prompts_per_iteration=4)
    params = run.setup.initial_params(0)
    rows = run.setup.probed
    (judged,) = judged_samples(run, params, None, jax.random.key(1), rows, samples=64, batch_samples=64, texts=True)
    assert judged.rewards.shape == (len(rows), 64) and 0 < judged.rewards.sum() < judged.rewards.size
    np.testing.assert_array_equal([verdict.reward for verdict in judged.verdicts], judged.rewards.ravel())
    assert judged.texts == decode(run.setup, *map(np.asarray, (judged.rollout.completions, judged.rollout.mask)))
    assert sum(judged.verdict_counts().values()) == judged.rewards.size
    alone = run._replace(pool=None)
    (same,) = judged_samples(alone, params, None, jax.random.key(1), rows, samples=64, batch_samples=64)
    np.testing.assert_array_equal(same.rewards, judged.rewards)
    assert same.texts is None and same.verdicts is None


def test_a_smaller_batch_runs_in_the_program_of_a_full_one(tmp_path):
    run = run_of(tmp_path, pool=True)
    params, rows = run.setup.initial_params(0), run.setup.probed[:5]
    options = {"samples": 4, "batch_samples": 2, "texts": True}
    plain = list(judged_samples(run, moved(params), params, jax.random.key(1), rows, **options))
    filled = list(judged_samples(run, moved(params), params, jax.random.key(1), rows, **options, num_prompts=8))
    assert len(plain) == len(filled) == 2
    for a, b in zip(plain, filled, strict=True):
        assert a.texts == b.texts and len(b.texts) == 10
        np.testing.assert_allclose(a.log_ratios, b.log_ratios, atol=1e-5)
        assert b.log_ratios.shape == b.rewards.shape == (5, 2)


def test_a_verifier_that_judges_nothing_is_an_error(tmp_path):
    run = run_of(tmp_path, pool=True)
    run.pool.first_crash = "ZeroDivisionError"
    check_verifier(run, {str(Verdict.crash): 5, str(Verdict.wrong): 1})
    with pytest.raises(VerifierFailed, match=r"none of 7 completions \(crash 5, timeout 2\); the first crash: Zero"):
        check_verifier(run, {str(Verdict.crash): 5, str(Verdict.timeout): 2})
    check_verifier(run._replace(pool=None), {str(Verdict.crash): 5})


def test_a_full_measurement_stops_between_two_batches(tmp_path):
    run = run_of(tmp_path)
    params = run.setup.initial_params(0)
    run.signals.append(15)
    with pytest.raises(Preempted, match="SIGTERM; the same command resumes"):
        measure_in_full(run, params, params, 0)
    measure(run, params, params, 0, samples=4, batch_samples=2)  # one on the way ends: its row belongs to a checkpoint


def test_a_measurement_that_is_stopped_between_any_two_batches_goes_on_from_there(tmp_path, monkeypatch):
    run = run_of(tmp_path, data__prompts_per_iteration=8)  # of 16 prompts
    params, options = run.setup.initial_params(0), {"samples": 12, "batch_samples": 4, "examples": 3, "may_stop": True}
    whole = measure(run, moved(params), params, 3, **options)
    drop_counts(run)
    judge, judged = measurement.judge, []
    monkeypatch.setattr(measurement, "judge", lambda *a, **k: (judged.append(1), judge(*a, **k))[1])
    for _ in range(6):  # 2 × 3 batches, each of them the last before a signal
        with pytest.raises(Preempted):
            measure(run._replace(signals=[15]), moved(params), params, 3, **options)
    parts = measure(run, moved(params), params, 3, **options)
    assert len(judged) == 6
    for name, value in whole._asdict().items():
        np.testing.assert_array_equal(getattr(parts, name), value, err_msg=name)
    # What was counted in full is kept too, until what is made of it is stored; of another policy nothing is taken.
    assert [measure(run, moved(params), params, 3, **options).successes.tolist()] == [whole.successes.tolist()]
    assert len(judged) == 6
    with pytest.raises(Preempted):
        measure(run._replace(signals=[15]), params, params, 3, **options)
    other = measure(run, moved(params), params, 3, **options)
    np.testing.assert_array_equal(other.successes, whole.successes)
    assert len(judged) == 7 and len(list(tmp_path.glob("measuring-*"))) == 2
    drop_counts(run)
    assert not list(tmp_path.iterdir())

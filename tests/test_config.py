"""validate: every conflict at once, with the numbers, and what a measurement may do that training may not."""

import pytest

from grpo_jax.config import ConfigError, validate
from tests.tiny_run import tiny_config


def conflicts(*, training=True, num_devices=8, **changes):
    try:
        validate(tiny_config(**changes), num_devices=num_devices, training=training)
    except ConfigError as error:
        assert str(error).splitlines()[1:] == [f"  - {line}" for line in error.conflicts]
        return error.conflicts
    return []


@pytest.mark.parametrize(("key", "value"), [("top_k", 2), ("top_p", 0.9), ("min_p", 0.05), ("top_p", 1.0)])
def test_a_cut_distribution_is_measured_but_never_trained_with(key, value):
    changes = {f"rollout__{key}": value}
    (line,) = conflicts(**changes)
    assert line.startswith(f"rollout.{key}={value} cannot be trained with")
    assert "the loss scores the whole distribution" in line and "--mode=evaluate accepts it" in line
    assert conflicts(training=False, **changes) == []


@pytest.mark.parametrize(
    ("key", "wrong", "words"),
    [
        ("rollout.top_k", (0, -1), "must be at least 1"),
        ("rollout.top_p", (0.0, 1.5), "must be in (0, 1]"),
        ("rollout.min_p", (-0.1, 1.1), "must be in [0, 1]"),
    ],
)
def test_ranges_of_the_cuts(key, wrong, words):
    for value in wrong:
        assert conflicts(training=False, **{key.replace(".", "__"): value}) == [f"{key}={value} {words}"]
    assert conflicts(training=False, rollout__top_p=1.0, rollout__min_p=0.0, rollout__top_k=1) == []


def test_the_averaged_share_is_one():
    for value in (-0.1, 1.5):
        words = "must be in [0, 1]: the share of the last iterations"
        assert conflicts(train__average=value) == [f"train.average={value} {words}"]
    assert conflicts(train__average=1.0) == []


def test_a_completion_fits_a_row_and_a_row_a_microbatch():
    assert conflicts(train__microbatch_tokens=3, train__row_length=3) == []  # completions have 3 tokens at most
    (line,) = conflicts(train__microbatch_tokens=2)
    assert line == "train.microbatch_tokens=2 is less than one completion of rollout.max_completion=3"
    (line,) = conflicts(train__microbatch_tokens=10, train__row_length=11)
    assert line == "train.row_length=11 is more than train.microbatch_tokens=10"
    for training in (True, False):
        (line,) = conflicts(training=training, train__row_length=2)
        assert line == "train.row_length=2 is less than one completion of rollout.max_completion=3"
    assert conflicts(training=False, train__microbatch_tokens=2) == []
    for key in ("microbatch_tokens", "row_length", "iterations_per_program"):
        assert f"train.{key}=0 must be at least 1" in conflicts(**{f"train__{key}": 0})


def test_prompts_divide_over_minibatches_and_devices():
    assert conflicts(train__minibatches=2, num_devices=4) == []
    (line,) = conflicts(train__minibatches=4, num_devices=4)
    assert line == (
        "data.prompts_per_iteration=8 is not divisible by train.minibatches=4 · 4 devices along mesh.data and mesh.fsdp; "
        "nearest: 16"
    )
    assert conflicts(training=False, train__minibatches=4, num_devices=4) == []


def test_stop_strings_are_texts():
    assert conflicts(model__stop_strings=("\n\n", "User:")) == []
    for wrong in (("",), (1,), ("a", None)):
        (line,) = conflicts(model__stop_strings=wrong)
        assert line == f"model.stop_strings={wrong} must be texts, none of them empty"


def test_all_conflicts_at_once():
    messages = conflicts(seed=-1, rollout__top_p=2.0, train__chunk_size=0, model__stop_strings=("",))
    assert [line.split("=")[0] for line in messages[:4]] == [
        "seed",
        "train.chunk_size",
        "rollout.top_p",
        "model.stop_strings",
    ]


def test_iterations_to_trace_are_checked():
    assert conflicts(train__profile=(2, 3)) == []
    for wrong in ((3,), (0, 1), (3, 2), (1, 8)):
        (line,) = conflicts(train__profile=wrong)
        assert line == f"train.profile={wrong} must be empty, or the first and the last iteration to trace, from 1 to 7"

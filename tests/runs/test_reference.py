"""The reference policy: made once, measured once, and read back."""

import json

import jax
import pytest

from grpo_jax.config import flat, validate
from grpo_jax.files import read_sealed, write_sealed
from grpo_jax.runs import attainable, reference
from grpo_jax.runs.directory import REFERENCE, contents
from grpo_jax.runs.loop import train
from grpo_jax.runs.reference import share_reference
from grpo_jax.tasks.identity import task_identity
from tests.runs.test_loop import QUICK, quiet
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(autouse=True, scope="module")
def promotion():
    """Optax's Adam raises floats to whole powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_a_reference_that_was_made_is_not_made_again(tmp_path):
    """Its measurement and its parameters are both on disk, each is read by itself."""
    config = tiny_config(mesh__data=8, **QUICK)
    train(config, tmp_path / "run", quiet())
    stored = read_sealed(tmp_path / "run" / REFERENCE)
    (tmp_path / "run" / "result.json").unlink()
    write_sealed(tmp_path / "run" / REFERENCE, stored | {"marked": True})
    train(config, tmp_path / "run", quiet())
    assert json.loads((tmp_path / "run" / REFERENCE).read_text())["marked"]


def test_a_run_with_the_same_reference_takes_it_over_bit_for_bit(tmp_path, monkeypatch):
    options = {"mesh__data": 8, "warm_start__target": 0.1, "train__iterations": 1, "attainable__steps": 1}
    first = tiny_config(**options)
    other = tiny_config(**options, objective__beta=2.0, optimizer__learning_rate=1e-3)

    def identity(config):
        return flat(config) | task_identity(validate(config, num_devices=8)[0])

    train(first, tmp_path / "first", quiet())
    alone = train(other, tmp_path / "alone", quiet())
    share_reference(tmp_path / "other", identity(other), [tmp_path / "none", tmp_path / "other", tmp_path / "first"])
    assert {"reference", "reference.json", "attainable.json", "config.json"} <= contents(tmp_path / "other")
    # Nothing is trained or measured again, and the end is the same.
    monkeypatch.setattr(reference, "warm_start", None)
    monkeypatch.setattr(reference, "measure_in_full", None)
    monkeypatch.setattr(attainable, "explained_share", None)
    assert train(other, tmp_path / "other", quiet()) == alone

    # Groups of another size have the same reference, and another R².
    config = tiny_config(**options, rollout__group_size=2)
    share_reference(tmp_path / "group", identity(config), [tmp_path / "first"])
    assert (tmp_path / "group" / "reference.json").exists()
    assert not (tmp_path / "group" / "attainable.json").exists()

    # Another seed or warm start has another reference; and a folder without a config is passed by.
    (tmp_path / "first" / "config.json").rename(tmp_path / "config.json")
    share_reference(tmp_path / "none", identity(first), [tmp_path / "first"])
    (tmp_path / "config.json").rename(tmp_path / "first" / "config.json")
    for name, change in (("seed", {"seed": 1}), ("batch", {"warm_start__batch": 8})):
        share_reference(tmp_path / name, identity(tiny_config(**options, **change)), [tmp_path / "first"])
        assert not (tmp_path / name).exists()
    assert not (tmp_path / "none").exists()

"""The reference policy: made once, measured once, and read back."""

import json

import jax
import pytest

from grpo_jax.files import write_json
from grpo_jax.runs.directory import REFERENCE
from grpo_jax.runs.loop import train
from tests.runs.test_loop import QUICK, quiet
from tests.tiny_run import tiny_config


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
    stored = json.loads((tmp_path / "run" / REFERENCE).read_text())
    (tmp_path / "run" / "result.json").unlink()
    write_json(tmp_path / "run" / REFERENCE, stored | {"marked": True})
    train(config, tmp_path / "run", quiet())
    assert json.loads((tmp_path / "run" / REFERENCE).read_text())["marked"]

"""Programs that several runs of a test file share."""

from collections.abc import Iterator

import pytest

from grpo_jax.config import flat
from grpo_jax.runs import setup as setup_file

# Keys on which no program depends, or which are its arguments.
FREE = (
    *("evaluate.", "verifier.", "checkpoint.", "attainable.", "objective.beta", "objective.target_"),
    *("optimizer.learning_rate", "train.watchdog", "train.without_success"),
)


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """One set of jitted functions for all configs that have the same programs: tracing them takes the time."""
    make, made = setup_file.make_compiled, {}

    def make_once(config, recipe, shapes, mesh, **options):
        differing = [(key, value) for key, value in flat(config).items() if key != "objective.beta_mirror"]
        key = str(
            [(k, v) for k, v in differing if not k.startswith(FREE)] + [config.objective.beta_mirror, mesh.devices]
        )
        if key not in made:
            made[key] = make(config, recipe, shapes, mesh, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup_file, "make_compiled", make_once)
        yield

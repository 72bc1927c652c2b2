"""--extend: a run goes on with more iterations, or with another β or learning rate, from its newest checkpoint.

What a run was extended by, and after which iteration, stands in its config.json, under "extended"; the other keys are those it
goes on with. A start with that config then is a start like any other: it resumes, and ends in the same bits however often it is
stopped.
"""

import json
from pathlib import Path
from typing import Any

from grpo_jax.files import read_sealed, write_sealed
from grpo_jax.processes import common
from grpo_jax.runs.directory import (
    CHANGEABLE,
    CONFIG,
    EXTENDABLE,
    EXTENDED,
    RESULT,
    check_same,
    contents,
    load,
    save,
    saved_steps,
)
from grpo_jax.runs.errors import RunDirectoryError


def extend(path: Path, config: dict[str, Any]) -> None:
    """Makes a config that of the run in a locked directory, where it differs in keys that training can go on with.

    Where it does not differ, or where there is no run yet, nothing is changed.

    Raises:
      RunDirectoryError: it differs in other keys, or the run cannot go on with it; nothing has been changed.
    """
    common(lambda: _extend(path, config))


def _extend(path: Path, config: dict[str, Any]) -> None:
    if not contents(path) > {CONFIG}:
        return
    advice = f"--extend goes on with another {' or '.join(EXTENDABLE)}. Choose another directory with --workdir=PATH"
    check_same(path, config, changeable=(*CHANGEABLE, *EXTENDABLE), advice=advice)
    stored, config = read_sealed(path / CONFIG), json.loads(json.dumps(config))
    changed = {key: [stored[key], config[key]] for key in EXTENDABLE if stored[key] != config[key]}
    steps = saved_steps(path / "checkpoints")
    if not changed:
        return
    if not steps:
        raise RunDirectoryError(f"the run in {path} has saved no iteration that --extend could go on from")
    after, iterations, share = steps[-1], stored["train.iterations"], stored["train.average"]
    if config["train.iterations"] <= after:
        raise RunDirectoryError(
            f"--extend: train.iterations={config['train.iterations']} must be above {after}, which are done"
        )
    if share and after > iterations - max(1, round(share * iterations)):
        raise RunDirectoryError(f"--extend: the average of the parameters in {path} has begun (train.average={share})")
    if "objective.beta" in changed and (path / "beta.json").exists():
        raise RunDirectoryError("--extend: β was chosen by a target of this run, and objective.beta is not read")
    extended = [*stored.get(EXTENDED, []), {"after": after, "changed": changed}]
    write_sealed(path / CONFIG, stored | {key: config[key] for key in EXTENDABLE} | {EXTENDED: extended})


def extensions(path: Path) -> list[dict[str, Any]]:
    """What the run in a directory was extended by: [{"after": iteration, "changed": {key: [before, now]}}]."""
    return common(lambda: read_sealed(path / CONFIG).get(EXTENDED, []))


def finished(path: Path) -> dict[str, Any] | None:
    """The result of a run, or None where it is not finished. That of a run that was extended since is kept as result-N.json."""
    result = load(path / RESULT)
    if result is None or result.get(EXTENDED, []) == extensions(path):
        return result
    save(path / f"result-{result['iterations']}.json", result)
    common((path / RESULT).unlink)
    return None


def extension_words(extended: list[dict[str, Any]]) -> list[str]:
    """
    >>> extension_words([{"after": 60, "changed": {"objective.beta": [1.0, 0.5], "train.iterations": [60, 90]}}])
    ['after iteration 60: objective.beta 1.0 → 0.5, train.iterations 60 → 90']
    """
    return [
        f"after iteration {one['after']}: "
        + ", ".join(f"{k} {old} → {new}" for k, (old, new) in one["changed"].items())
        for one in extended
    ]

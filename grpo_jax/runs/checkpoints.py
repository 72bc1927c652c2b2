"""Checkpoints by Orbax, with what it does not give: digests of every leaf, and a fall-back to the newest step that is intact.

Orbax commits a step atomically, but restores flipped bits without a word and offers an empty directory as the latest step. So
each step carries the SHA-256 of its leaves, and a step that does not match is put aside, never deleted.
"""

import hashlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from grpo_jax.runs.errors import CheckpointError


class Checkpoints:
    """The checkpoints of a run: ``save`` returns once the step is on disk; ``restore_latest`` returns only what is intact."""

    def __init__(self, directory: Path, *, keep: int | None, report: Callable[[str], None] = logging.warning):
        self._directory = directory
        self._report = report
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes the arrays of ``state`` and the JSON of ``meta`` as one step.

        Raises:
          CheckpointError: nothing was saved (disk full, no permission, a step that is not newer than the last); earlier steps are
            untouched.
        """
        meta = meta | {"digests": digests(state)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            with _quiet():
                saved = self._manager.save(step, args=arguments)
                self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"checkpoint {step} could not be written to {self._directory}: {error}") from error
        if not saved:
            raise CheckpointError(
                f"checkpoint {step} was not written to {self._directory}: a step as new is there already"
            )

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest intact step as (step, state, meta); None where there never was one.

        Newer steps that are damaged are put aside as ``STEP.corrupt`` once an intact one is found, and not before: what looks
        like damage may be a full memory or a missing permission.

        Args:
          like: the state's structure: arrays, or ``jax.ShapeDtypeStruct`` with shardings.

        Raises:
          CheckpointError: there are checkpoints and none can be restored; a run must not silently start over.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self.restore(step, like)
            except Exception as error:  # whatever is wrong with it, the older step may be good
                damaged[step] = _first_line(error)
                continue
            for bad, reason in damaged.items():
                self._put_aside(bad, reason)
            if damaged:
                self._manager.reload()  # Orbax remembers the steps it has seen
            return step, *restored
        aside = [path.name for path in self._directory.glob("*.corrupt*")]
        if damaged or aside:
            reasons = [f"  - {step}: {reason}" for step, reason in damaged.items()] + [f"  - {name}" for name in aside]
            raise CheckpointError(
                "\n".join(
                    [f"no checkpoint in {self._directory} can be restored:", *reasons, "Start again in a new --workdir"]
                )
            )
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, meta) of one step; raises where it is missing or damaged, and leaves it where it is."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
        with _quiet():
            restored = self._manager.restore(step, args=arguments)
        expected, actual = restored["meta"].pop("digests"), digests(restored["state"])
        if expected != actual:
            wrong = [name for name in actual if actual[name] != expected.get(name)]
            raise ValueError(f"the data of {', '.join(wrong[:3])} changed on disk (SHA-256)")
        return restored["state"], restored["meta"]

    def _put_aside(self, step: int, reason: str) -> None:
        number = sum(1 for _ in self._directory.glob(f"{step}.corrupt*"))
        aside = self._directory / (f"{step}.corrupt" + (f".{number}" if number else ""))
        (self._directory / str(step)).rename(aside)
        self._report(f"checkpoint {step} is damaged ({reason}); kept as {aside.name}, and an older one taken")

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def digests(tree: Any) -> dict[str, str]:
    """{path of leaf: SHA-256 of its type, shape and bytes}.

    >>> import jax.numpy as jnp
    >>> a, b = digests({"w": jnp.zeros(2)}), digests({"w": jnp.zeros(2).at[0].set(1e-45)})
    >>> list(a) == ["w"] and a["w"] != b["w"]
    True
    """

    def digest(leaf: Any) -> str:
        array = np.asarray(leaf)
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): digest(leaf) for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"


@contextmanager
def _quiet() -> Any:
    """Orbax logs its every step and warns of its own internals; what matters reaches the user as an exception."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)

"""Checkpoints by Orbax, with what it does not give: checksums of every leaf, and a fall-back to the newest step that is intact.

Orbax commits a step atomically, but restores flipped bits without a word and offers an empty directory as the latest step. So
each step carries checksums of its leaves, and a step that does not match is put aside, never deleted. They are sums made where
the leaves lie, so that nothing is gathered, and the same however a leaf is spread.
"""

import hashlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from grpo_jax.processes import common, host, together
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
        meta = meta | {"checksums": checksums(state)}
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
        for step in common(lambda: sorted(self._manager.all_steps(), reverse=True)):
            try:
                restored = self.restore(step, like)
            except Exception as error:  # whatever is wrong with it, the older step may be good
                damaged[step] = _first_line(error)
                continue
            for bad, reason in damaged.items():
                common(partial(self._put_aside, bad, reason))
            if damaged:
                self._manager.reload()  # Orbax remembers the steps it has seen
            return step, *restored
        aside = common(lambda: [path.name for path in self._directory.glob("*.corrupt*")])
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
        path = self._directory / str(step)

        def read() -> Any:
            with _quiet():
                return ocp.StandardCheckpointHandler().restore(path / "state", args=ocp.args.StandardRestore(like))

        # Without Orbax's barriers, at which the others would wait for one that cannot read its part.
        meta = common(lambda: ocp.JsonCheckpointHandler().restore(path / "meta", ocp.args.JsonRestore()))
        state = together(read)
        if "digests" in meta:  # of versions that stored SHA-256
            expected, actual = meta.pop("digests"), _sha256(state)
        else:
            expected, actual = meta.pop("checksums"), checksums(state)
        if expected != actual:
            wrong = [name for name in actual if actual[name] != expected.get(name)]
            raise ValueError(f"the data of {', '.join(wrong[:3])} changed on disk (checksums)")
        return state, meta

    def _put_aside(self, step: int, reason: str) -> None:
        number = sum(1 for _ in self._directory.glob(f"{step}.corrupt*"))
        aside = self._directory / (f"{step}.corrupt" + (f".{number}" if number else ""))
        (self._directory / str(step)).rename(aside)
        self._report(f"checkpoint {step} is damaged ({reason}); kept as {aside.name}, and an older one taken")

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def checksums(tree: Any) -> dict[str, str]:
    """{path of leaf: its type, shape and two sums}; equal for equal bits, on whatever devices they lie.

    The sums are Σ_k w_k·bits_k modulo 2³² over the entries k, with two odd weights for each. So a change of a single entry
    always changes both, because an odd w has an inverse; of others, one in 2⁶⁴ would not be seen.

    >>> a, b = checksums({"w": jnp.zeros(2)}), checksums({"w": jnp.zeros(2).at[0].set(1e-45)})
    >>> list(a) == ["w"] and a["w"] != b["w"]
    True
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.block_until_ready(tree))
    # One after the other: programs of several CPU devices that wait in line may lock each other out.
    sums = {jax.tree_util.keystr(path, simple=True, separator="/"): host(_sums(leaf)) for path, leaf in leaves}
    types = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, (_, leaf) in zip(sums, leaves, strict=True)}
    return {name: f"{types[name]} {''.join(f'{n:08x}' for n in both.tolist())}" for name, both in sums.items()}


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """[2] uint32, see `checksums`."""
    bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    width = min(bits.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    number = jnp.zeros(bits.shape, jnp.uint32)  # of the entry, in row-major order
    for axis, size in enumerate(bits.shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

    def weighted(factor: int) -> jax.Array:
        mixed = (number + jnp.uint32(1)) * jnp.uint32(factor)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        return (bits * ((mixed ^ (mixed >> 12)) | jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jnp.stack([weighted(0x9E3779B1), weighted(0x85EBCA77)])


def _sha256(tree: Any) -> dict[str, str]:
    """{path of leaf: SHA-256 of its type, shape and bytes}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): host(leaf) for path, leaf in leaves}
    return {
        name: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest() for name, x in arrays.items()
    }


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

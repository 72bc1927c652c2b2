"""Checkpoints by Orbax, with what it does not give: checksums of every leaf, and a fall-back to the newest step that is intact.

Orbax commits a step atomically, but restores flipped bits without a word and offers an empty directory as the latest step. So
each step carries checksums of its leaves, and a step that does not match is put aside, never deleted. They are sums made where
the leaves lie, so that nothing is gathered, and the same however a leaf is spread.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from grpo_jax.files import seal, unseal
from grpo_jax.processes import common, host, own_share, together
from grpo_jax.report.metrics_log import METRICS, rows_digest
from grpo_jax.runs.errors import CheckpointError
from grpo_jax.storage import plainly_named, remove_folder

READ_AT_ONCE = 1 << 30  # bytes of a step that are read back at a time
FACTORS, MIXER = (0x9E3779B1, 0x85EBCA77), 0x2C1B3C6D  # odd, of the weights of `checksums`


class Checkpoints:
    """The checkpoints of a run: ``save`` returns once the step is on disk; ``restore_latest`` returns only what is intact."""

    def __init__(self, directory: Path, *, keep: int | None, report: Callable[[str], None] = logging.warning):
        self._directory = directory
        self._report = report
        self._stack = ExitStack()
        _drop_late_replies()
        self._plain = self._stack.enter_context(plainly_named(directory))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._plain, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes the arrays of ``state`` and the JSON of ``meta`` as one step, and reads it back.

        Raises:
          CheckpointError: nothing was saved (disk full, no permission, a step that is not newer than the last, what was read is
            not what was written); earlier steps are untouched.
        """
        if common(lambda: step in self._manager.all_steps()):  # not what a killed save left in a bucket
            raise CheckpointError(f"checkpoint {step} was not written to {self._directory}: it is there already")
        sums = checksums(state)
        meta = seal(meta | {"checksums": sums}, name=f"checkpoint {step}")
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            with _quiet():
                saved = self._manager.save(step, args=arguments)
                self._manager.wait_until_finished()
            if saved:
                together(partial(self._check, step, sums))
        except Exception as error:
            reason = _first_line(error)
            common(partial(self._remove_unsaved, step, reason))
            raise CheckpointError(f"checkpoint {step} could not be written to {self._directory}: {reason}") from error
        if not saved:
            raise CheckpointError(
                f"checkpoint {step} was not written to {self._directory}: a step as new is there already"
            )

    def _check(self, step: int, expected: dict[str, str]) -> None:
        """Reads the arrays of a step, each process a share of them, as they came to disk; ValueError where they are others."""
        path, handler = self._plain / str(step) / "state", ocp.PyTreeCheckpointHandler()
        with _quiet():
            tree = handler.metadata(path).tree
            leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
            names = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in leaves]
            if sorted(names) != sorted(expected):
                raise ValueError("it has other arrays than were written")
            as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            for chosen in parts([(math.prod(leaf.shape) * leaf.dtype.itemsize) for _, leaf in leaves], READ_AT_ONCE):
                wanted = [leaf if i in chosen else ocp.PLACEHOLDER for i, (_, leaf) in enumerate(leaves)]
                arguments = ocp.args.PyTreeRestore(jax.tree.unflatten(structure, wanted), restore_args=as_arrays)
                for name, array in zip(names, jax.tree.leaves(handler.restore(path, args=arguments)), strict=True):
                    if isinstance(array, np.ndarray) and _described(array, host_sums(array)) != expected[name]:
                        raise ValueError(f"{name} is read back as something else")

    def _remove_unsaved(self, step: int, reason: str) -> None:
        """Removes what a save has left half done; one that lies there and is not what it should be is put aside."""
        if (self._directory / str(step)).exists():
            self._put_aside(step, reason)
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            remove_folder(path)

    def restore_latest(self, like: Any, *, rows_of: Path | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest intact step as (step, state, meta); None where there never was one.

        Newer steps that are damaged are put aside as ``STEP.corrupt`` once an intact one is found, and not before: what looks
        like damage may be a full memory or a missing permission.

        Args:
          like: the state's structure: arrays, or ``jax.ShapeDtypeStruct`` with shardings.
          rows_of: the run directory, whose metrics.jsonl must have the rows that a step vouches for ("rows" of its meta).

        Raises:
          CheckpointError: there are checkpoints and none can be restored; a run must not silently start over.
        """
        damaged: dict[int, str] = {}
        for step in common(lambda: sorted(self._manager.all_steps(), reverse=True)):
            try:
                restored = self.restore(step, like)
                if rows_of is not None and common(partial(rows_digest, rows_of, step)) != restored[1]["rows"]:
                    raise ValueError(f"the rows of {rows_of / METRICS} up to it changed")
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
        path = self._plain / str(step)

        def read() -> Any:
            with _quiet():
                return ocp.StandardCheckpointHandler().restore(path / "state", args=ocp.args.StandardRestore(like))

        # Without Orbax's barriers, at which the others would wait for one that cannot read its part.
        sealed = common(lambda: ocp.JsonCheckpointHandler().restore(path / "meta", ocp.args.JsonRestore()))
        meta = unseal(sealed, name=f"checkpoint {step}")
        state = together(read)
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
        self._stack.close()


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
    return {name: _described(leaf, both) for (name, both), (_, leaf) in zip(sums.items(), leaves, strict=True)}


def digest(tree: Any) -> str:
    """One digest of all `checksums`."""
    return hashlib.sha256(json.dumps(checksums(tree)).encode()).hexdigest()


def _described(leaf: Any, sums: np.ndarray) -> str:
    return f"{leaf.dtype}{list(leaf.shape)} {''.join(f'{n:08x}' for n in sums.tolist())}"


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
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(MIXER)
        return (bits * ((mixed ^ (mixed >> 12)) | jnp.uint32(1))).sum(dtype=jnp.uint32)

    return jnp.stack([weighted(factor) for factor in FACTORS])


def host_sums(array: np.ndarray) -> np.ndarray:
    """The two sums of `checksums`, [2] uint32, of an array of the host.

    >>> host_sums(np.arange(5, dtype=np.float32)).tolist() == _sums(jnp.arange(5.0)).tolist()
    True
    """
    width = min(array.dtype.itemsize, 4)
    bits, sums = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * width}"), np.zeros(2, np.uint32)
    for first in range(0, bits.size, 1 << 20):  # so that it needs little memory beside
        some = bits[first : first + (1 << 20)].astype(np.uint32)
        number = np.arange(first + 1, first + 1 + some.size, dtype=np.int64).astype(np.uint32)
        for i, factor in enumerate(FACTORS):
            mixed = number * np.uint32(factor)
            mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(MIXER)
            weights = (mixed ^ (mixed >> np.uint32(12))) | np.uint32(1)
            sums[i] += (some * weights).sum(dtype=np.uint32)
    return sums


def parts(sizes: list[int], most: int) -> list[set[int]]:
    """Numbers of arrays of these bytes, those of this process, in sets of at most ``most`` bytes or of one array.

    >>> parts([3, 3, 9, 1], 6)
    [{0, 1}, {2}, {3}]
    """
    sets: list[set[int]] = []
    total = 0
    for i in own_share(len(sizes)):
        if not sets or total + sizes[i] > most:
            sets.append(set())
            total = 0
        sets[-1].add(i)
        total += sizes[i]
    return sets


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:600] if str(error).strip() else 'no message'}"


@cache
def _drop_late_replies() -> None:
    """Files that are still being read when a first one has failed reply to nobody, with a stack trace each on stderr."""
    late, hook, unraisable = "Event loop is closed", sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if str(error) == late else hook(kind, error, trace)
    sys.unraisablehook = lambda about: None if str(about.exc_value) == late else unraisable(about)


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

"""Several processes that run one program: who writes, what one decides for all, and how they fail and stop as one.

Every process runs the same program and makes the same calls of this module in the same order. They differ in the devices and
the rows that they hold, and no other module knows that there are several. With one process each function is the plain thing it
stands for, and nothing is communicated.
"""

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from grpo_jax.environment import program

T = TypeVar("T")

HUNG = 76  # exit code of a process that its watchdog has ended
LEAVING = 10  # seconds that a process which fails waits for the others to fail with it
_alone = False  # main decides for all: what it calls must not wait for the others
_moves: "_Timer | None" = None  # who watches
_polls = itertools.count(1)
_stopping = False


def initialize(
    *,
    coordinator: str | None = None,
    number: int | None = None,
    own: int | None = None,
    timeout: int = 120,
    heartbeat: int = 100,
) -> None:
    """Waits for the other processes; call it before anything touches a device.

    Args:
      coordinator: HOST:PORT where process 0 listens; None asks the machine, which knows on Cloud TPU, GKE, Slurm and Open MPI.
      number: of processes.
      own: the number of this one, from 0 on.
      timeout: seconds to wait.
      heartbeat: seconds after which a silent process counts as dead, and the others end.

    Raises:
      RuntimeError: the others did not come, or two have the same number; the message is one line.
    """
    who = "this process" if own is None else f"process {own} of {number}, at {coordinator}"
    print(f"{who}: waiting for the others, {timeout} s at most", file=sys.stderr, flush=True)
    options: dict[str, Any] = {"initialization_timeout": timeout + 60, "heartbeat_timeout_seconds": heartbeat}
    if coordinator is not None and number is not None and own is not None:
        call_roll(coordinator, number, own, timeout)
        options["cluster_detection_method"] = "deactivate"
    # Slurm and Open MPI make jax take one GPU a process, unless it is told of more.
    elif _is_alone_on_host() and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        options["local_device_ids"] = list(range(len(visible.split(","))))
    # jax aborts with a stack trace where it waits in vain, so that it is given longer than this.
    timer = threading.Timer(timeout, _give_up, (f"{who}: the others did not come within {timeout} s",))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(coordinator, number, own, **options)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{who}: {str(error).strip().splitlines()[0]}") from error
    finally:
        timer.cancel()


def _is_alone_on_host() -> bool:
    """Whether Slurm or Open MPI says that each host has one process."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    return tasks.partition("(")[0] == "1"


def call_roll(coordinator: str, number: int, own: int, timeout: float) -> None:
    """Returns when all processes are there; each tells process 0 its number, and is told when the last has come.

    Args:
      coordinator: HOST:PORT where process 0 listens.
      number: of processes.
      own: the number of this one.
      timeout: seconds to wait.

    Raises:
      RuntimeError: naming the processes that did not come, or the number that came twice; the same in all that came.

    >>> call_roll("127.0.0.1:0", 1, 0, timeout=1.0)
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if not (host and port.isdigit()):
        raise RuntimeError(f"--coordinator={coordinator} must be HOST:PORT")
    try:
        if own == 0:
            _listen(int(port), number, deadline)
        else:
            _report(host, int(port), own, deadline)
    except OSError as error:
        what = "cannot listen, is another run" if own == 0 else "nobody answers, is process 0"
        raise RuntimeError(f"process {own} of {number}: {what} at {coordinator}? ({error})") from None


def _listen(port: int, number: int, deadline: float) -> None:
    problem: str | None = None
    present: dict[int, socket.socket] = {}
    with socket.create_server(("", port), backlog=number) as server, ExitStack() as stack:
        while len(present) < number - 1 and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                other = json.loads(connection.makefile().readline())
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, number) if i not in present)
                problem = f"of {number} processes, these did not come in time: {missing}"
            except (OSError, ValueError):
                continue  # who else looks at open ports
            else:
                if other in present or other not in range(1, number):
                    problem = f"of {number} processes, another one says that it is process {other}"
                present[other if problem is None else -1] = connection
        for connection in present.values():
            connection.sendall(json.dumps(problem).encode() + b"\n")
    if problem is not None:
        raise RuntimeError(problem)


def _report(host: str, port: int, own: int, deadline: float) -> None:
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    with connection:
        connection.sendall(json.dumps(own).encode() + b"\n")
        connection.settimeout(max(deadline - time.monotonic(), 0) + 5)  # process 0 may have begun to wait later
        answer = connection.makefile().readline()
    if not answer:
        raise RuntimeError(f"process {own}: process 0 has ended while it waited for others")
    problem = json.loads(answer)
    if problem is not None:
        raise RuntimeError(problem)


def _give_up(message: str) -> None:
    print(f"{program()}: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def devices_of_all() -> list[Any]:
    """A device of each process."""
    devices = jax.devices()
    return [next(device for device in devices if device.process_index == i) for i in range(count())]


def common(decide: Callable[[], T]) -> T:
    """What main decides, for all: its value, which must be JSON, or its exception.

    >>> common(lambda: {"step": 3})
    {'step': 3}
    """
    global _alone
    if _alone or count() == 1:
        return decide()
    value, error = None, None
    if is_main():
        _alone = True
        try:
            value = decide()
        except Exception as raised:
            error = raised
        finally:
            _alone = False
    value, failure = _broadcast([value, _described(error)])
    if failure is not None:
        raise error or _exception(*failure)
    return value


@contextmanager
def held_by_main(enter: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """A context that main enters and leaves, for all: its value must be JSON, and its exception is everybody's."""
    with ExitStack() as stack:
        yield common(lambda: stack.enter_context(enter()))


def together(work: Callable[[], T]) -> T:
    """What each process does on its own part; where it fails in one, it fails in all, with the same exception.

    >>> together(lambda: 1 + 1)
    2
    """
    if _alone or count() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    failures = everyone(_described(error))
    first = next((i for i, failure in enumerate(failures) if failure is not None), None)
    if first is not None:
        raise error if error is not None and first == jax.process_index() else _exception(*failures[first])
    return result  # type: ignore[return-value]


def everyone(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order.

    >>> everyone("here")
    ['here']
    """
    if _alone or count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
    padded = np.zeros(_padded_size(int(lengths.max())), np.uint8)
    padded[: len(text)] = text
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(count(), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths.tolist(), strict=True)]


def check_alike(settings: dict[str, Any]) -> None:
    """Raises ValueError, in all processes, where they were started with different settings {name: JSON value}."""
    if count() == 1:
        return
    first, *others = everyone(settings)
    for number, other in enumerate(others, start=1):
        differing = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
        if differing:
            lines = (
                f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} there" for name in differing[:5]
            )
            raise ValueError(f"process {number} was started with other settings: {'; '.join(lines)}")


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Arrays that every process holds, as arrays on all devices; ``sharding`` is that of every leaf."""
    if count() == 1:
        return jax.device_put(tree, sharding)

    def leaf(x: Any) -> jax.Array:
        host_array = np.asarray(x)
        return jax.make_array_from_callback(host_array.shape, sharding, lambda index: host_array[index])

    return jax.tree.map(leaf, tree)


def host(array: Any) -> np.ndarray:
    """An array of all devices as every process can read it; what the others hold is gathered."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array [P, ...] that are this process's to work on: each belongs to one process that holds it.

    >>> own_rows(jax.numpy.zeros((3, 2))).tolist()
    [0, 1, 2]
    """
    holders: list[set[int]] = [set() for _ in range(array.shape[0])]
    places: Any = array.sharding.devices_indices_map(array.shape)
    for device, index in places.items():
        for row in range(*index[0].indices(array.shape[0])):
            holders[row].add(device.process_index)
    owners = [sorted(of_row)[row % len(of_row)] for row, of_row in enumerate(holders)]
    return np.flatnonzero(np.array(owners) == jax.process_index())


def own_share(number: int) -> range:
    """Which of so many things are this process's to work on: each is that of one process.

    >>> list(own_share(3))
    [0, 1, 2]
    """
    return range(jax.process_index(), number, count())


def of_rows(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    """Rows of an array, which this process holds."""
    if array.is_fully_addressable:
        return np.asarray(array)[rows]
    held = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        held[shard.index] = shard.data
    return held[rows]


def stop_requested(received: list[int]) -> bool:
    """Whether all must stop, because SIGTERM has arrived at one of them; the same answer in all.

    Args:
      received: SIGTERMs that the handler of a single process has seen. With several, jax's own handler listens.
    """
    global _stopping
    if _alone or count() == 1:
        return bool(received)
    from jax.experimental import multihost_utils

    _stopping = _stopping or multihost_utils.reached_preemption_sync_point(next(_polls))
    return _stopping


@contextmanager
def watched(seconds: float | None, *, of_several: float | None = None) -> Iterator[None]:
    """Ends this process with `HUNG`, and all its stacks on stderr, where what is inside takes longer; then others end, too.

    A process that waits for another one in vain waits for ever otherwise, and looks alive.

    Args:
      seconds: that it may take; None: as long as it will.
      of_several: the same in place of None, where there are several processes. One alone may be a laptop that slept.
    """
    if seconds is None and count() > 1:
        seconds = of_several
    if seconds is None:
        yield
        return
    timer = _Timer(seconds)
    try:
        timer.begin()
        yield
    finally:
        timer.end()
        moved()  # whoever watches the whole run begins anew


@contextmanager
def watched_for_moves(seconds: float | None) -> Iterator[None]:
    """The same as `watched` where for so long nothing has called `moved`; None: it may take as long as it will."""
    global _moves
    _moves = None if seconds is None else _Timer(seconds)
    try:
        moved()
        yield
    finally:
        if _moves is not None:
            _moves.end()
        _moves = None


def moved() -> None:
    """Says that a piece of work is done, to whoever watches."""
    if _moves is not None:
        _moves.begin()


class _Timer:
    """Ends this process as hung so many seconds after it last began."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timer: threading.Timer | None = None

    def begin(self) -> None:
        self.end()
        self.timer = threading.Timer(self.seconds, _end_hung, (self.seconds,))
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(self.seconds + 10, exit=True)  # where C code holds the interpreter, with 1

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            faulthandler.cancel_dump_traceback_later()


def _end_hung(seconds: float) -> None:
    print(f"{program()}: nothing has moved for {seconds:g} s; where each thread stands:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(HUNG)


def leave(code: int) -> None:
    """Ends a process that has failed or was stopped, with this exit code, whatever the others do."""
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    timer = threading.Timer(2 * LEAVING, os._exit, (code,))
    timer.daemon = True
    timer.start()
    try:
        # jax would abort those that are still at work as soon as the first has gone, also on its way out of here.
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key="leave", timeout_ms=1000 * LEAVING)
        jax.distributed.shutdown()
    finally:
        os._exit(code)


def _broadcast(value: Any) -> Any:
    """Main's JSON value."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(_padded_size(length), np.uint8)
    if is_main():
        padded[:length] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:length].tobytes())


def _padded_size(length: int) -> int:
    """A power of two, so that few sizes are compiled."""
    return 1 << max(6, (length - 1).bit_length())


def _described(error: Exception | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _exception(name: str, message: str) -> Exception:
    """An exception of another process; of its class, where that takes a message alone."""
    todo: list[type] = [Exception]
    while todo:
        found = todo.pop()
        if found.__name__ == name:
            try:
                return found(message)
            except TypeError:
                break
        todo += found.__subclasses__()
    return RuntimeError(f"{name}: {message}")

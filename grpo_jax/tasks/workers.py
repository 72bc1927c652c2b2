"""Verifiers in processes of their own: a completion that makes one hang or crash loses its own reward, and the run goes on.

A worker is a fresh interpreter that imports the verifier's module and nothing of the trainer: never a fork (jax is
loaded here) and never a second import of the launching script. It takes batches as lines of JSON on its standard
input and answers each item with one line, so that the parent always knows which item is being judged. One thread per
worker starts it, feeds it, waits for it, and replaces it.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpo_jax.tasks.task import Verdict
from grpo_jax.tasks.verifiers import import_path
from grpo_jax.tasks.worker_process import WorkerProcess

_log = logging.getLogger(__name__)
_START_SECONDS = 60.0  # to start Python and import the verifier; not part of any item's deadline
_START_ATTEMPTS = 3  # a worker may be killed from outside while it starts
_CHUNK = 64  # items per message at most


class VerifierPool:
    """Judges completions in ``num_workers`` processes, in order, whatever they do to the verifier.

    verify: ``verify(completion, target, truncated) -> Verdict``, a function of an importable module (not of
    ``__main__``). num_workers: processes, started at once. deadline: seconds of wall time for one item, a backstop
    for hangs: leave it far above what any honest item needs, since rewards must not depend on the machine's load.
    memory_limit_bytes: address space of a worker. Workers have an empty environment, stand in the root folder, and
    cannot write to files; what the verifier prints is dropped. They end with the pool, or with the process that holds
    it, however that ends.

    An item whose judging passes the deadline is a ``timeout``. It is a ``crash`` if the verifier raised or returned
    something else than a Verdict, or if it ended two fresh workers, one after the other (exit, abort, out of memory): so
    no item loses its reward when something else kills a worker. The other items are unaffected. The first crash is
    logged, and its reason stays in ``first_crash``: printable ASCII, "" while there is none.

    Raises ValueError for a verifier that a worker could not import or numbers out of range; RuntimeError if its
    import fails.

    >>> from grpo_jax.tasks import arithmetic
    >>> with VerifierPool(arithmetic().verify, num_workers=1) as pool:
    ...     print(*pool.verify(["15", "16", "what?"], ["15", "15", "15"], [False, False, False]))
    correct wrong unparsable
    """

    def __init__(
        self,
        verify: Callable[[str, str, bool], Verdict],
        *,
        num_workers: int = 1,
        deadline: float = 5.0,
        memory_limit_bytes: int = 2 << 30,
    ) -> None:
        numbers = {"num_workers": num_workers, "deadline": deadline, "memory_limit_bytes": memory_limit_bytes}
        if wrong := [f"{name}={value}" for name, value in numbers.items() if not 0 < value < math.inf]:
            raise ValueError(f"{', '.join(wrong)}: must be positive and finite")
        self._verifier = import_path(verify)
        self._deadline = deadline
        self._memory_limit = memory_limit_bytes
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[_Item] = deque()
        self._workers: set[WorkerProcess] = set()
        self._ready = 0
        self._failure: Exception | None = None
        self._closed = False
        self.first_crash = ""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_workers)]
        for thread in self._threads:
            thread.start()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._ready >= num_workers)
            self._check()
        except BaseException:
            self.close()
            raise

    def verify(self, completions: Sequence[str], targets: Sequence[str], truncated: Sequence[bool]) -> list[Verdict]:
        """The verdicts of completions with their targets, in order; may be called from several threads.

        Raises ValueError where the lengths differ, RuntimeError where the pool is closed or a worker cannot be
        replaced.
        """
        requests = list(zip(completions, targets, map(bool, truncated), strict=True))
        batch = _Batch([Verdict.crash] * len(requests), len(requests))
        items = [_Item(batch, i, request) for i, request in enumerate(requests)]
        with self._changed:
            self._check()
            self._queue.extend(items)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not batch.remaining or self._failure or self._closed)
            if batch.remaining:
                self._check()
        return batch.verdicts

    def close(self) -> None:
        """Ends the workers; a call of ``verify`` in progress raises RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._failure:
            raise RuntimeError(str(self._failure)) from self._failure
        if self._closed:
            raise RuntimeError("the verifier pool is closed")

    def _run(self) -> None:
        """The life of one worker and its replacements, children of this thread: the kernel ends them with it."""
        try:
            worker = self._start()
            with self._changed:
                self._ready += 1
                self._changed.notify_all()
            while items := self._take():
                while not self._judge(worker, items):
                    self._give_back(items)
                    self._discard(worker)
                    worker = self._start()
        except Exception as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
        finally:
            with self._changed:
                mine = [worker for worker in self._workers if worker.thread is threading.current_thread()]
            for worker in mine:
                self._discard(worker)

    def _start(self) -> WorkerProcess:
        for _ in range(_START_ATTEMPTS):
            worker = WorkerProcess(self._verifier, self._memory_limit)
            with self._changed:
                self._workers.add(worker)
                self._check()
            try:
                error = worker.receive(_START_SECONDS)
            except (OSError, EOFError, ValueError):
                error = f"the worker {worker.kill()} before it was ready"
                self._discard(worker)
                continue
            if error is None:
                return worker
            break
        raise RuntimeError(f"verifier {self._verifier} cannot start: {error}")

    def _discard(self, worker: WorkerProcess) -> None:
        worker.kill()
        worker.close_pipes()
        with self._changed:
            self._workers.discard(worker)

    def _take(self) -> deque["_Item"]:
        """The next items, few enough to leave work for the others; none when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return deque()
            count = min(_CHUNK, -(-len(self._queue) // (2 * len(self._threads))))
            return deque(self._queue.popleft() for _ in range(count))

    def _give_back(self, items: deque["_Item"]) -> None:
        """Returns items to the queue, but not one that a worker ended on: the fresh one alone can tell whose fault."""
        with self._changed:
            while items and not items[-1].worker_ended:
                self._queue.appendleft(items.pop())
            self._changed.notify_all()

    def _judge(self, worker: WorkerProcess, items: deque["_Item"]) -> bool:
        """Settles items in order and removes them, until the worker fails. Returns whether it can go on."""
        if not items:
            return True
        try:
            worker.send([item.request for item in items], self._deadline)
            while items:
                verdict, reason = worker.receive(self._deadline)
                self._settle(items[0], Verdict(verdict), reason)
                items.popleft()
            return True
        except TimeoutError:
            self._settle(items.popleft(), Verdict.timeout)
        except (OSError, EOFError, ValueError, TypeError):  # it died, or sent what is no reply
            if items[0].worker_ended:
                self._settle(items.popleft(), Verdict.crash, f"the worker {worker.kill()}")
            else:
                items[0].worker_ended = True
        return False

    def _settle(self, item: "_Item", verdict: Verdict, reason: str = "") -> None:
        with self._changed:
            item.batch.verdicts[item.index] = verdict
            item.batch.remaining -= 1
            if not item.batch.remaining:
                self._changed.notify_all()
            first = verdict is Verdict.crash and not self.first_crash and not self._closed
            if first:
                self.first_crash = ascii(reason)[1:-1]  # it may quote a completion: escape sequences, half surrogates
        if first:
            _log.warning("verifier %s: first crash: %s; later ones are counted only", self._verifier, self.first_crash)


@dataclass
class _Batch:
    """The results of one call of ``verify``, and how many are still missing."""

    verdicts: list[Verdict]
    remaining: int


@dataclass
class _Item:
    batch: _Batch
    index: int
    request: tuple[str, str, bool]
    worker_ended: bool = False  # while judging it, or before, while it waited for work

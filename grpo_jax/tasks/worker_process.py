"""One verifier process as its parent sees it: a fresh interpreter, two pipes, and a way to end it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

_REPLY_BYTES = 1 << 16  # a longer line is no reply of ours
_SCRIPT = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from grpo_jax.tasks.worker_main import serve
serve(*sys.argv[1:])
"""


class WorkerProcess:
    """One process and the two ends of its pipes, spoken to by the thread that made it."""

    def __init__(self, verifier: str, memory_limit: int) -> None:
        # The trainer's import paths come along: a verifier beside launch.py, or in a test, is found from any folder.
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        arguments = [paths, verifier, str(memory_limit), str(os.getpid())]
        libraries = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in libraries if name in os.environ}
        self.thread = threading.current_thread()
        self._lock = threading.Lock()
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-P", "-c", _SCRIPT, *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # not the run's folder, whatever the verifier does
            env=environment | {"PYTHONHASHSEED": "0"},  # the order of sets is the same in every worker
            start_new_session=True,  # Ctrl-C is for the trainer; and what the verifier starts can be killed with it
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)

    def send(self, message: Any, seconds: float) -> None:
        """Raises TimeoutError if it is not read in time, OSError if the worker is gone."""
        data = memoryview(json.dumps(message).encode() + b"\n")  # ASCII: NUL, surrogates and newlines are escaped
        end = time.monotonic() + seconds
        while data:
            _wait(self._stdin.fileno(), select.POLLOUT, end)
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self._stdin.fileno(), data) :]

    def receive(self, seconds: float) -> Any:
        """Raises TimeoutError, EOFError if the worker is gone, ValueError for what is no reply."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            _wait(self._stdout.fileno(), select.POLLIN, end)
            data = os.read(self._stdout.fileno(), _REPLY_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
            if len(self._buffer) > 2 * _REPLY_BYTES:
                raise ValueError("too long a reply")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> str:
        """Ends the worker and all it started, unless it ended by itself; says how it ended. Safe from any thread."""
        with self._lock:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        code = self._process.returncode
        return f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"

    def close_pipes(self) -> None:
        self._stdin.close()
        self._stdout.close()


def _wait(descriptor: int, event: int, end: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError

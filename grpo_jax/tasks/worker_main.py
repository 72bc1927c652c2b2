"""The main of one verifier worker: lines of JSON in on standard input, one line per verdict out; see workers.py."""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from grpo_jax.tasks.task import Verdict

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def serve(verifier: str, memory_limit: str, parent: str) -> None:
    """Limits itself, imports the verifier, says so, then judges until its input ends.

    verifier: ``module:function``. memory_limit: bytes of address space. parent: process id. The first line sent is
    ``null``, or a string that says why the verifier cannot be imported; then one line ``[verdict, reason]`` per item.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the verifier prints must not look like a reply
        os.dup2(null, stream)
    _limit(int(memory_limit), int(parent))

    def reply(message: Any) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        module, name = verifier.split(":")
        verify = attrgetter(name)(importlib.import_module(module))
    except BaseException as error:
        reply(f"{type(error).__name__}: {error}"[:1000])
        return
    reply(None)
    for line in requests:
        for completion, target, truncated in json.loads(line):
            reply(_verdict(verify, completion, target, truncated))


def _limit(memory_limit: int, parent: int) -> None:
    if sys.platform == "linux":  # end with the parent even while hanging in C code; elsewhere, at the end of input
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    for kind, value in (("AS", memory_limit), ("FSIZE", 0), ("CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system may lack or refuse one
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))


def _verdict(verify: Callable[..., Any], completion: str, target: str, truncated: bool) -> tuple[str, str]:
    try:
        verdict = verify(completion, target, truncated)
    except MemoryError:
        os._exit(1)  # it may be the fault of earlier items: a fresh worker will tell
    except BaseException as error:
        return Verdict.crash, f"{type(error).__name__}: {error}"[:300]
    if not isinstance(verdict, Verdict):
        kind = type(verdict).__name__
        return Verdict.crash, f"it returned a {kind}, not a Verdict: return Verdict.correct or Verdict.wrong"
    return verdict, ""

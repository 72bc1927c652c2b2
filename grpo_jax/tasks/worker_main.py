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
_CLONE_NEWUSER, _CLONE_NEWPID = 0x10000000, 0x20000000  # <sched.h>


def serve(verifier: str, memory_limit: str, parent: str) -> None:
    """Limits itself, imports the verifier, says so, then judges until its input ends.

    verifier: ``module:function``. memory_limit: bytes of address space. parent: process id. The first line sent is
    ``null``, or a string that says why the verifier cannot be imported; then one line ``[verdict, reason]`` per item.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the verifier prints must not look like a reply
        os.dup2(null, stream)
    _die_with(int(parent))
    _isolate()
    _limit(int(memory_limit))

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


def _die_with(parent: int) -> None:
    """Ends this process with its parent, even while it hangs in C code; elsewhere than on Linux, at the end of input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() not in (parent, 0):  # 0: outside of the own space of process numbers
            os._exit(1)


def _isolate() -> None:
    """Goes on in a space of process numbers of its own, where the system lets it make one.

    Nothing in it can name a process outside, to send it a signal; and all that is in it ends with the first process in it,
    whatever sessions it has begun. That first process is not the worker, because a first process ignores most signals:

        the trainer's child, which waits   →   the first in the space, which collects what has ended   →   the worker
    """
    if sys.platform != "linux":
        return
    libc, user, group = ctypes.CDLL(None), os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWPID):
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWPID):
            return
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    for _ in range(2):
        _go_on_in_a_child()


def _go_on_in_a_child() -> None:
    """Returns in the child; the parent ends as the child does."""
    own = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(own)
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            break
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else code - 128
    if 0 < number < 65:  # a first process cannot end itself by a signal: it says so by its code
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        if own != 1:
            os.kill(own, number)
        os._exit(128 + number)
    os._exit(code)


def _limit(memory_limit: int) -> None:
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

"""Verifiers that misbehave on demand, for test_workers.py: worker processes import this module."""

import ctypes
import os
import subprocess
import sys
import time
from decimal import Decimal
from typing import Any

from grpo_jax.tasks import Verdict


def obey(completion: str, target: str, truncated: bool) -> Any:
    """Does what the completion says; otherwise compares it with the target."""
    match completion.split(" ")[0]:
        case "HANG_IN_C":
            int(Decimal("1e3000000"))  # holds the interpreter's lock for minutes
        case "SLEEP":
            time.sleep(float(completion.split(" ")[1]))
        case "MEMORY":
            return Verdict.correct if bytearray(4 << 30) else Verdict.wrong
        case "ABORT":
            os.abort()
        case "SEGFAULT":
            ctypes.string_at(0)
        case "EXIT":
            os._exit(0)
        case "EXIT_ONCE":
            _exit_once(completion.split(" ", 1)[1])
        case "SYS_EXIT":
            sys.exit(0)
        case "RAISE":
            raise RuntimeError("no such luck \x1b[31m \ud800")
        case "RECURSE":
            return obey(completion, target, truncated)
        case "PRINT":
            for stream in (sys.stdout, sys.stderr, sys.__stdout__):
                assert stream is not None
                for _ in range(64):
                    stream.write('["correct", ""]\n' * (1 << 16))
            os.write(1, b'["correct", ""]\n')
            return Verdict.wrong
        case "READ_INPUT":
            return Verdict.wrong if sys.stdin.read() == "" else Verdict.correct
        case "WRITE_FILE":
            with open(completion.split(" ", 1)[1], "w") as file:
                file.write("x" * 100_000)
            return Verdict.correct
        case "ENVIRONMENT":
            return Verdict.correct if os.environ.get("A_SECRET") else Verdict.wrong
        case "TRAINER":
            return Verdict.correct if {"jax", "numpy"} & set(sys.modules) else Verdict.wrong
        case (
            "LEAVE"
        ):  # in sessions of their own, one through a child that ends, with nothing of the worker's environment
            for _ in range(2):
                subprocess.Popen(["sleep", completion.split(" ")[1]], start_new_session=True, env={})
            if os.fork() == 0:
                os.setsid()
                os.execve(
                    "/bin/sh", ["sh", "-c", f"sleep {completion.split(' ')[1]} & sleep {completion.split(' ')[1]}"], {}
                )
            return Verdict.correct
        case "SIGNAL":
            found = 0
            for act, number in ((os.kill, int(completion.split(" ")[1])), (os.killpg, os.getpgid(os.getppid()))):
                try:
                    act(number, 0)
                    found += number > 1
                except OSError:
                    pass
            return Verdict.wrong if found == 0 else Verdict.correct
        case "RETURN":
            values = {"None": None, "nan": float("nan"), "True": True, "1.0": 1.0, "str": "correct", "list": []}
            return values[completion.split(" ")[1]]
    return Verdict.correct if completion == target and not truncated else Verdict.wrong


def _exit_once(path: str) -> None:
    """Ends the worker the first time, as if something outside had killed it. A folder marks it: files cannot be written."""
    if not os.path.exists(path):
        os.mkdir(path)
        os._exit(1)

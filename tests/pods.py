"""A pod on this machine: several processes that run one command, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many CPU devices, with the cache of compiled programs of all tests."""
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return inherited | cache | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """A process of Python with these arguments."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pod(command: Sequence[str], *, processes: int = 2, devices: int = 1, each: Sequence[Sequence[str]] = ()):
    """The processes of launch.py with these flags, and with ``each[i]`` for process i."""
    pod = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}", "--wait=60", "--heartbeat=10"]
    return [
        start("launch.py", *command, *pod, f"--process_id={i}", *(each[i] if each else ()), devices=devices)
        for i in range(processes)
    ]


def end(started: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process, when all have ended; those that do not are killed."""
    try:
        found = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, found, strict=True)]

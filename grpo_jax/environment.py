"""What must be known before jax computes anything; every command line starts with it."""

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_CACHE, _LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def program() -> str:
    """The name of the command that this process is, with which its messages begin: launch.py, or grpo-jax."""
    return Path(sys.argv[0]).name


STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def end_on_signals() -> None:
    """Signals to stop end a process in which nothing is under way yet with 75, or 130 for SIGINT; a run has its own handlers."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{program()}: stopped by {signal.Signals(number).name} before anything was begun\n".encode())
        os._exit(130 if number == signal.SIGINT else 75)

    for number in STOPS:
        signal.signal(number, end)


def prepare_streams() -> None:
    """Lets nothing that is printed fail where the locale has no β."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def cache_folder() -> Path:
    """Where this package keeps what it can make or fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_jax"


def prepare_environment() -> None:
    """Sets where compiled programs are kept, and an XLA flag without which sums on a CPU can be wrong."""
    os.environ.setdefault(_CACHE, str(cache_folder() / "compiled"))
    os.environ.setdefault(_LEAST, "0")
    if jax := sys.modules.get("jax"):  # which has read its own variables when it was imported, but not yet XLA's
        jax.config.update(_CACHE.lower(), os.environ[_CACHE])
        jax.config.update(_LEAST.lower(), float(os.environ[_LEAST]))
    # On CPUs, "YNN" fusions of jaxlib 0.10.2 to 0.12.0 can return wrong sums without an error (tests/test_xla.py); no fusion
    # is named, so there are none. Later versions may not know the flag, and an unknown one is fatal.
    flag = "--xla_cpu_experimental_ynn_fusion_type="
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").split(".")[:2] in (["0", "10"], ["0", "11"], ["0", "12"]) and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flag} {flags}"

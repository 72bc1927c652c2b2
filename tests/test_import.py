"""What `import grpo_jax` costs a project that already has jax: no other package, and less than 50 ms."""

import compileall
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Both rooms load when touched, so they are touched. Time is that of the thread: other processes may have the processor.
PROBE = """
import sys, time
import jax, jax.numpy
before, start = set(sys.modules), time.thread_time()
import grpo_jax
grpo_jax.grpo_loss, grpo_jax.theory.flow_point
seconds = time.thread_time() - start
print(seconds, *sorted(set(sys.modules) - before))
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package with its bytecode, as pip installs it, and nothing else of the checkout."""
    shutil.copytree(ROOT / "grpo_jax", tmp_path / "grpo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(tmp_path / "grpo_jax", quiet=1)
    return tmp_path


def test_both_rooms_load_in_50_ms_beyond_jax_and_bring_no_package_along(installed):
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", PROBE], cwd=installed, capture_output=True, text=True, check=True)
        seconds, *modules = run.stdout.split()
        times.append(float(seconds))
        assert {"grpo_jax.objective.loss", "grpo_jax.theory.limits"} <= set(modules)
        packages = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert packages <= {"grpo_jax", "jax"}
    assert min(times) < 0.05, times

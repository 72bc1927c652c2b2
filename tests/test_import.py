"""What `import grpo_jax` costs a project that already has jax: its own modules and nothing else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Both rooms load when touched, so they are touched.
PROBE = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import grpo_jax
grpo_jax.grpo_loss, grpo_jax.theory.flow_point
print(*sorted(set(sys.modules) - before))
"""


def test_both_rooms_bring_no_package_along_and_no_part_of_jax_that_is_not_there_yet():
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(run.stdout.split())
    assert {"grpo_jax.objective.loss", "grpo_jax.theory.limits"} <= modules
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) == {"grpo_jax"}

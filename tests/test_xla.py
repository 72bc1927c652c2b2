"""XLA computes the sums it is asked for, under the flags that launch.py and these tests set."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import jax, jax.numpy as jnp
f = lambda x: [(jnp.arange(n, dtype=x.dtype) * x[:, None]).sum(-1) for n in (6, 7)]
print([float(y[0]) for y in jax.jit(f)(jnp.ones(2049))])
"""


def test_two_sums_of_different_width_in_one_program():
    """Without the flag, jaxlib 0.11.2 and 0.12.0.1 answer 15 and 15: the second sum reuses the first one's arange."""
    found = jax.jit(lambda x: [(jnp.arange(n, dtype=x.dtype)[None] * x[:, None]).sum(-1) for n in (6, 7)])(
        jnp.ones(2049)
    )
    assert [float(y[0]) for y in found] == [15.0, 21.0]


def test_launch_sets_what_is_needed():
    code = "from grpo_jax.environment import prepare_environment; prepare_environment()" + CODE
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[15.0, 21.0]"

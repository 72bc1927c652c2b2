"""Runs a config in a checkout, as `grpo-jax` does where the package is installed; grpo_jax/command.py is what both run.

python launch.py --config=configs/small.py
"""

from grpo_jax.command import run

if __name__ == "__main__":
    run()

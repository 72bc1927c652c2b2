"""What the parts cost, beside other forms of the same computation; each is a command that prints a table."""

from grpo_jax.environment import prepare_environment

# Here, because jax reads it when it is first imported, and every benchmark imports jax.
prepare_environment()

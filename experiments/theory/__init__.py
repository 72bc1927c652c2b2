"""What the theory says, drawn and tabulated: one command per figure, listed in experiments/README.md."""

from grpo_jax.environment import prepare_environment

# Here, because jax reads it when it is first imported, and every experiment imports jax.
prepare_environment()

"""Prompts and verifiers. Nothing here loads jax or NumPy, so that verifier processes start in milliseconds."""

from grpo_jax.tasks.arithmetic import arithmetic
from grpo_jax.tasks.countdown import countdown
from grpo_jax.tasks.stories import stories
from grpo_jax.tasks.task import Example, Task, Verdict
from grpo_jax.tasks.verifiers import ANSWERS, TARGETS, VERIFIERS, find_answer, find_target_check, find_verifier

__all__ = [
    "ANSWERS",
    "TARGETS",
    "VERIFIERS",
    "Example",
    "Task",
    "Verdict",
    "arithmetic",
    "countdown",
    "find_answer",
    "find_target_check",
    "find_verifier",
    "stories",
]

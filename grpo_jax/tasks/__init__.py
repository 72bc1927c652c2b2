"""Prompts and verifiers. Nothing here loads jax or NumPy, so that verifier processes start in milliseconds."""

from collections.abc import Callable
from typing import Any

from grpo_jax.tasks.arithmetic import arithmetic
from grpo_jax.tasks.stories import stories
from grpo_jax.tasks.task import Example, Task, Verdict

__all__ = ["Example", "Task", "Verdict", "arithmetic", "make_task", "stories"]


def make_task(name: str, **options: Any) -> Task:
    """The task of that name, with its function's own options.

    Raises ValueError for an unknown name or a wrong value, and TypeError for an unknown option.

    >>> make_task("arithmetic", operand_max=1).examples[-1]
    Example(prompt='1+1=', target='2')
    """
    tasks: dict[str, Callable[..., Task]] = {"arithmetic": arithmetic, "stories": stories}
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(tasks)}")
    return tasks[name](**options)

"""Digests of a task: a run or an evaluation that is resumed must find the same data and the same verifier."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.tasks.task import Task


def task_identity(task: Task) -> dict[str, str]:
    """Both digests, by the keys under which a directory is bound to them.

    >>> from grpo_jax.tasks import arithmetic
    >>> sorted(task_identity(arithmetic("+", 9)))
    ['task.examples', 'task.verify']
    """
    return {"task.examples": task_digest(task), "task.verify": verifier_digest(task.verify)}


def task_digest(task: Task) -> str:
    """SHA-256, in hexadecimal, of all prompts and targets in their order.

    >>> from grpo_jax.tasks import arithmetic
    >>> task = arithmetic("+", 9)
    >>> task_digest(task)[:16], task_digest(task._replace(examples=task.examples[:99]))[:16]
    ('1ed2d4573325f991', 'ac6a1d8d2935829b')
    """
    # As JSON in ASCII: one spelling for any text, half of a surrogate pair included, and no two tasks with the same.
    examples = json.dumps([list(example) for example in task.examples])
    return hashlib.sha256(examples.encode()).hexdigest()


def verifier_digest(verify: Callable[..., Any]) -> str:
    """``module:function``; for a user's own, the SHA-256 of the module's source file behind it.

    What the module imports in turn is not covered.

    >>> from grpo_jax.tasks import find_verifier
    >>> verifier_digest(find_verifier("number_last"))
    'grpo_jax.tasks.numeric:verify_last'
    >>> import json
    >>> path, digest = verifier_digest(json.loads).split(" sha256:")
    >>> path, len(digest)
    ('json:loads', 64)
    """
    module = verify.__module__
    path = f"{module}:{verify.__qualname__}"
    source = getattr(sys.modules.get(module), "__file__", None)
    if module.split(".")[0] == "grpo_jax" or source is None:
        return path
    return f"{path} sha256:{hashlib.sha256(Path(source).read_bytes()).hexdigest()}"

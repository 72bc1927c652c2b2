"""The digest of a task's examples, and of the verifier with a user's own source."""

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from grpo_jax.tasks import Example, Task, Verdict, find_verifier
from grpo_jax.tasks.identity import task_digest, verifier_digest


def never(completion: str, target: str, truncated: bool) -> Verdict:
    return Verdict.wrong


def digest(*examples: tuple[str, str], name: str = "x") -> str:
    return task_digest(Task(name, tuple(Example(*example) for example in examples), never))


def test_every_change_of_the_examples_changes_the_digest() -> None:
    tasks = [
        (("a", "b"), ("c", "d")),
        (("c", "d"), ("a", "b")),
        (("a", "b"),),
        (),
        (("ab", ""), ("c", "d")),
        (("a", 'b"], ["c'), ("", "d")),
        (("a", "b"), ("c", "d"), ("c", "d")),
        (("a", "\ud800"), ("c", "d")),
        (("a", "\\ud800"), ("c", "d")),
        (("é", "b"), ("c", "d")),
        (("e\u0301", "b"), ("c", "d")),
    ]
    assert len({digest(*examples) for examples in tasks}) == len(tasks)
    assert digest(*tasks[0]) == digest(*tasks[0], name="y") == hashlib.sha256(b'[["a", "b"], ["c", "d"]]').hexdigest()


def test_a_users_verifier_is_bound_to_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_verifier_with_identity.py"
    path.write_text("def verify(completion, target, truncated):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    verify = importlib.import_module(path.stem).verify
    before = verifier_digest(verify)
    assert before == f"{path.stem}:verify sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    path.write_text(path.read_text() + "\n")
    assert verifier_digest(verify) != before
    assert verifier_digest(find_verifier("exact")) == "grpo_jax.tasks.structured:verify_exact"

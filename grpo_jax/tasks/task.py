"""What a task is: prompts with targets, and a verifier that says what became of one completion."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple


class Verdict(StrEnum):
    """What a verifier says of one completion; only ``correct`` earns a reward, and each is counted in the metrics.

    ``correct`` and ``wrong`` judge an answer; ``unparsable`` found none; ``too_long`` is a text that did not stop in
    time where the task asks for it, or passes the verifier's cap; ``timeout`` and ``crash`` say that the verifier
    itself hung or died.

    >>> [verdict.reward for verdict in (Verdict.correct, Verdict.wrong, Verdict.timeout)]
    [1.0, 0.0, 0.0]
    >>> Verdict("too_long") is Verdict.too_long, str(Verdict.crash)
    (True, 'crash')
    """

    correct = "correct"
    wrong = "wrong"
    unparsable = "unparsable"
    too_long = "too_long"
    timeout = "timeout"
    crash = "crash"

    @property
    def reward(self) -> float:
        """1.0 if correct, else 0.0: the binary reward of arXiv 2503.06639, §2."""
        return 1.0 if self is Verdict.correct else 0.0


class Example(NamedTuple):
    """One prompt and what its verifier needs to know: an answer, or a constraint in text form."""

    prompt: str
    target: str


class Task(NamedTuple):
    """Prompts with a verifier at one or two speeds.

    name: for logs and reports.
    examples: all prompts, in a fixed order; their index addresses the randomness of a rollout.
    verify: ``verify(completion, target, truncated) -> Verdict`` on the host, for one completion as text; ``truncated``
        says it never emitted EOS. A function of a module, since worker processes find it by its import path.
    verify_tokens: the verdict ``correct`` of the same verifier on token arrays, EOS inside both masks, or None:
        ``verify_tokens(completions [P, G, T], mask [P, G, T], answers [P, T], answer_mask [P, T]) -> bool [P, G]``.
    demonstrations: a right completion of an example, without EOS, for the supervised warm start, or None.
    answer: the answer that a completion gives, in one spelling per value, or None where it gives none: what a majority
        vote counts. None where the task has no such notion.

    >>> def verify(completion: str, target: str, truncated: bool) -> Verdict:
    ...     return Verdict.correct if completion == target else Verdict.wrong
    >>> task = Task("echo", (Example("say a:", "a"),), verify)
    >>> task.verify("a", task.examples[0].target, False)
    <Verdict.correct: 'correct'>
    """

    name: str
    examples: tuple[Example, ...]
    verify: Callable[[str, str, bool], Verdict]
    verify_tokens: Callable[[Any, Any, Any, Any], Any] | None = None
    demonstrations: Callable[[Example], str] | None = None
    answer: Callable[[str], str | None] | None = None

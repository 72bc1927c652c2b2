"""Sums, differences and products of small numbers, verified exactly: as text on the host, as tokens on the device."""

from typing import Any

from grpo_jax.tasks.numeric import answer_last, verify_last
from grpo_jax.tasks.task import Example, Task, Verdict

ALPHABET = "0123456789+-*="
"""Every character a prompt or an answer can hold; a character tokenizer needs these and EOS."""

MOST = 1_000_000  # prompts: each is a row in memory
_COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def arithmetic(
    operators: str = "+",
    operand_max: int = 9,
    left: tuple[int, ...] = (),
    right: tuple[int, ...] = (),
    prompt: str | None = None,
) -> Task:
    """Every ``a∘b=`` with a, b in 0..operand_max and ∘ in operators; the answer is the canonical integer, then EOS.

    operators: distinct characters of ``+-*``. operand_max: ≥ 0. left, right: (first, last, step) of a and of b, instead of
    0..operand_max. prompt: text with ``{sum}``, where ``a ∘ b`` is put, for a model that reads text; its answer is then the
    last number of the completion (``number_last``), which need not be the whole of it, and there are no demonstrations.
    Returns a Task of an example for each operator, a and b, in this order. Raises ValueError for an unknown or repeated
    operator, a negative operand_max, operands that are not (first, last, step), or a prompt without its field.

    >>> task = arithmetic("+-", operand_max=9)
    >>> len(task.examples), task.examples[78], task.examples[100 + 37]
    (200, Example(prompt='7+8=', target='15'), Example(prompt='3-7=', target='-4'))
    >>> [x.prompt for x in arithmetic(left=(11, 13, 2), right=(5, 5, 1), prompt="Q: {sum} A:").examples]
    ['Q: 11 + 5 A:', 'Q: 13 + 5 A:']
    >>> task.verify("15", "15", False).reward
    1.0
    """
    unknown = [operator for operator in operators if operator not in _COMPUTE]
    if not operators or unknown or len(set(operators)) < len(operators):
        raise ValueError(f"operators must be distinct characters of '{''.join(_COMPUTE)}', got {operators!r}")
    if operand_max < 0:
        raise ValueError(f"operand_max must be at least 0, got {operand_max}")
    lefts, rights = (_operands(name, chosen, operand_max) for name, chosen in (("left", left), ("right", right)))
    if (number := len(lefts) * len(rights) * len(operators)) > MOST:
        raise ValueError(f"{number:,} prompts are more than {MOST:,}: choose fewer operands")
    sums = [(a, operator, b) for operator in operators for a in lefts for b in rights]
    answers = [str(_COMPUTE[operator](a, b)) for a, operator, b in sums]
    if prompt is None:
        examples = tuple(Example(f"{a}{operator}{b}=", x) for (a, operator, b), x in zip(sums, answers, strict=True))
        return Task("arithmetic", examples, verify, verify_tokens, demonstrations=lambda example: example.target)
    if "{sum}" not in prompt:
        raise ValueError(f"prompt={prompt!r} must hold {{sum}}")
    texts = [prompt.replace("{sum}", f"{a} {operator} {b}") for a, operator, b in sums]
    return Task("arithmetic", tuple(map(Example, texts, answers)), verify_last, answer=answer_last)


def _operands(name: str, chosen: tuple[int, ...], operand_max: int) -> range:
    """The operands of one side: (first, last, step), or 0..operand_max where nothing is chosen."""
    if not chosen:
        return range(operand_max + 1)
    if len(chosen) != 3 or not all(type(x) is int for x in chosen) or not 0 <= chosen[0] <= chosen[1] or chosen[2] < 1:
        raise ValueError(f"{name}={chosen} must be (first, last, step), whole numbers with 0 <= first <= last")
    first, last, step = chosen
    return range(first, last + 1, step)


def verify(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the completion is the target, character for character, and stopped by itself.

    No number is ever computed from the completion, so no text is expensive: ``-0``, ``015``, ``+15``, `` 15`` and
    full-width digits are not the canonical integer.

    completion: text before EOS. target: canonical integer. truncated: no EOS was emitted. Returns a Verdict; never
    raises.

    >>> [str(verify(text, "15", False)) for text in ("15", "16", "015", "15 ", "")]
    ['correct', 'wrong', 'wrong', 'unparsable', 'unparsable']
    >>> verify("15", "15", True)
    <Verdict.too_long: 'too_long'>
    """
    if truncated:
        return Verdict.too_long
    if completion == target:
        return Verdict.correct
    digits = completion.removeprefix("-")
    return Verdict.wrong if digits.isascii() and digits.isdigit() else Verdict.unparsable


def verify_tokens(completions: Any, mask: Any, answers: Any, answer_mask: Any) -> Any:
    """Correct iff a completion's tokens, EOS included, are exactly the answer's: the token form of ``verify``.

    completions [P, G, T] and answers [P, T]: integer tokens; mask [P, G, T] and answer_mask [P, T]: bool, True up to
    and with EOS. What lies outside the masks is never looked at. A truncated completion lacks EOS, so it never
    matches; an answer that does not fit in T tokens must come with an all-False mask and matches nothing. Returns
    bool [P, G]. Only operators and methods of the arrays are used, so NumPy and JAX (jitted or not) serve alike;
    checked against ``verify`` in tests/tasks.

    >>> import numpy as np
    >>> completions = np.array([[[1, 5, 99], [1, 6, 99], [1, 5, 1]]])  # "15", "16" and "151..." (truncated); EOS is 99
    >>> verify_tokens(completions, completions >= 0, np.array([[1, 5, 99]]), np.array([[True] * 3]))
    array([[ True, False, False]])
    """
    same_length = (mask == answer_mask[:, None, :]).all(-1)
    same_tokens = ((completions == answers[:, None, :]) | ~answer_mask[:, None, :]).all(-1)
    return same_length & same_tokens & answer_mask.any(-1)[:, None]

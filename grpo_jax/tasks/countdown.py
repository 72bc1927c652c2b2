"""Countdown: make a total out of some numbers with + - * / and parentheses, using each number exactly once.

Puzzles are made here, from random steps that solve them; answers are read by a parser of a dozen lines, in exact fractions.
A target is text, ``24: 3 8 8 1``: what to make, and from what; ``24: [3, 8, 8, 1]`` says the same.
"""

import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.tasks.answers import TAG, last_answer, nesting
from grpo_jax.tasks.task import Example, Task, Verdict

PROMPT = (
    "Make {total} out of {numbers}, using each number exactly once, with + - * / and parentheses. "
    "End with the expression alone, as <answer>expression</answer>."
)
MAX_CHARACTERS, MAX_DEPTH = 256, 32
"""An answer of more characters, or with more parentheses open at a time, is ``too_long``."""

_SPELLINGS = str.maketrans("×÷−", "*/-")
_SPACE = re.compile(r"[ \t\r\n]+")
_TOKEN = re.compile(r"0|[1-9][0-9]*|[-+*/()]")
_TARGET = re.compile(r"([0-9]{1,9}): ?(\[?)([0-9]{1,9}(?:,? [0-9]{1,9}){1,15})(\]?)")


def countdown(
    num_examples: int = 1000,
    num_numbers: int = 4,
    max_number: int = 25,
    max_total: int = 100,
    seed: int = 0,
    prompt: str = PROMPT,
) -> Task:
    """Different puzzles with a solution in whole positive steps: no difference below 1, no quotient with a remainder.

    num_examples: puzzles, no two of the same total and numbers. num_numbers: 2 to 6. max_number, max_total: numbers are drawn
    uniformly from 1..max_number, and combined at random until a total is in 1..max_total. seed: the puzzles are the same on
    every machine and Python. prompt: text with ``{numbers}`` and ``{total}``; shorter for a small model.
    Returns a Task whose demonstrations are the solutions. Raises ValueError for options out of range, a prompt without
    these two fields, or where there are not so many puzzles.

    >>> task = countdown(2, num_numbers=3, prompt="{numbers} = {total}? ")
    >>> task.examples[0], task.demonstrations(task.examples[0])
    (Example(prompt='16 23 25 = 64? ', target='64: 16 23 25'), '<answer>25+23+16</answer>')
    """
    options = (
        ("num_examples", num_examples, 10**7),
        ("max_number", max_number, 10**6),
        ("max_total", max_total, 10**9 - 1),
    )
    if wrong := [f"{name}={value} must be 1 to {most}" for name, value, most in options if not 1 <= value <= most]:
        raise ValueError("; ".join(wrong))
    if not 2 <= num_numbers <= 6:
        raise ValueError(f"num_numbers={num_numbers} must be 2 to 6")
    if "{numbers}" not in prompt or "{total}" not in prompt:
        raise ValueError(f"prompt={prompt!r} must hold {{numbers}} and {{total}}")

    # Puzzles that have a solution: numbers at random, and the total that random steps make of them.
    random_float = random.Random(seed).random  # the one method whose numbers no Python version may change
    seen = set()
    solutions: dict[str, str] = {}
    examples = []
    for _ in range(200 * num_examples + 10_000):
        numbers = [1 + int(random_float() * max_number) for _ in range(num_numbers)]
        total, expression = _combine(numbers, random_float)
        puzzle = (total, *sorted(numbers))
        if total <= max_total and puzzle not in seen:
            seen.add(puzzle)
            spelled = " ".join(map(str, numbers))
            target = f"{total}: {spelled}"
            solutions[target] = f"<answer>{expression}</answer>"
            examples.append(Example(prompt.replace("{numbers}", spelled).replace("{total}", str(total)), target))
            if len(examples) == num_examples:
                break
    if len(examples) < num_examples:
        raise ValueError(
            f"found only {len(examples)} different puzzles of {num_numbers} numbers up to {max_number} that make at most "
            f"{max_total}: ask for fewer than num_examples={num_examples}, or for larger numbers"
        )
    return Task("countdown", tuple(examples), verify, demonstrations=lambda e: solutions[e.target], answer=answer)


def verify(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the last ``<answer>…</answer>`` holds an expression of the numbers, each once, that makes the total.

    An expression has whole numbers in ASCII digits, ``+ - * /`` (or ``− × ÷``), parentheses, and white space; a minus may
    open the whole or a parenthesis. Nothing else is read: ``3*8=24``, ``3.0``, ``1_0``, ``08``, ``2**3`` are ``unparsable``,
    as is a completion without an answer. Steps may be negative or fractions, which are exact; dividing by zero is ``wrong``.

    completion, truncated: as in answers.py, which says what the last answer is where there are several; an answer of more than
    256 characters or 32 open parentheses is ``too_long``. target: ``24: 3 8 8 1``. Raises ValueError for another target.

    >>> answers = ("(8*3)/(8/8)", "8/(3-8/3)", "8*3", "3 * 8 × 8 ÷ 8", "3*8*8/8=24", "38-8-8")
    >>> [str(verify(f"So <answer>{text}</answer>", "24: 3 8 8 8", False)) for text in answers]
    ['correct', 'wrong', 'wrong', 'correct', 'unparsable', 'wrong']
    """
    total, numbers = _read_target(target)
    expression = _parse(completion, truncated)
    if isinstance(expression, Verdict):
        return expression
    return Verdict.correct if expression.value == total and sorted(expression.numbers) == numbers else Verdict.wrong


def answer(completion: str) -> str | None:
    """The expression that ``verify`` judges, the same for every order of terms and factors; None where it has no value.

    >>> [answer(f"<answer>{text}</answer>") for text in ("(8 × 3) - (2-1)", "1 + 3*8 - 2", "8/(4/2)", "1/0", "8+")]
    ['1+3*8-2', '1+3*8-2', '2*8/4', None, None]
    """
    expression = _parse(completion, False)
    return None if isinstance(expression, Verdict) or expression.value is None else _spell(expression)


def check_target(target: str) -> None:
    """Raises ValueError for a target that is not a total and its numbers.

    >>> check_target("24: 3, 8 and 8")
    Traceback (most recent call last):
    ...
    ValueError: target '24: 3, 8 and 8' is not a total and 2 to 16 numbers, such as 24: 3 8 8 1
    """
    _read_target(target)


def _read_target(target: str) -> tuple[int, list[int]]:
    match = _TARGET.fullmatch(target)
    if not match or bool(match[2]) != bool(match[4]):
        raise ValueError(f"target {target[:100]!r} is not a total and 2 to 16 numbers, such as 24: 3 8 8 1")
    return int(match[1]), sorted(map(int, match[3].replace(",", "").split()))


def _combine(numbers: list[int], random_float: Callable[[], float]) -> tuple[int, str]:
    """Combines two of the numbers at a time until one is left; returns its value and its expression."""
    left = [(number, str(number), 3) for number in numbers]  # value, text, how tightly it binds: 1 sum, 2 product
    while len(left) > 1:
        a, b = sorted((left.pop(int(random_float() * len(left))) for _ in range(2)), reverse=True)
        operators = "+*" + "-" * (a[0] > b[0]) + "/" * (a[0] % b[0] == 0)
        operator = operators[int(random_float() * len(operators))]
        value = {"+": a[0] + b[0], "*": a[0] * b[0], "-": a[0] - b[0], "/": a[0] // b[0]}[operator]
        binds = 2 if operator in "*/" else 1
        first = a[1] if a[2] >= binds else f"({a[1]})"
        second = b[1] if b[2] >= binds + (operator in "-/") else f"({b[1]})"
        left.append((value, first + operator + second, binds))
    return left[0][:2]


class _Expression(NamedTuple):
    """A number (kind "", spelled), or a sum or product of parts, each with whether it is subtracted or divided by."""

    value: Fraction | None  # None: divides by zero
    numbers: tuple[int, ...]
    kind: str
    parts: "tuple[tuple[bool, _Expression], ...]" = ()


def _parse(completion: str, truncated: bool) -> "_Expression | Verdict":
    bodies = last_answer(completion, truncated, TAG)
    if isinstance(bodies, Verdict):
        return bodies
    if len(bodies[-1]) > MAX_CHARACTERS:
        return Verdict.too_long
    tokens = _tokens(bodies[-1])
    if tokens is None or any(_tokens(other) != tokens for other in bodies):
        return Verdict.unparsable
    if nesting(token for token in tokens if token in "()") > MAX_DEPTH:
        return Verdict.too_long
    tokens.reverse()
    try:
        expression = _sum(tokens)
    except _NotAnExpression:
        return Verdict.unparsable
    return Verdict.unparsable if tokens else expression


def _tokens(text: str) -> list[str] | None:
    """The numbers, operators and parentheses of a text; None where it holds anything else."""
    text = text.translate(_SPELLINGS)
    tokens = _TOKEN.findall(text)
    return tokens if "".join(tokens) == _SPACE.sub("", text) else None


class _NotAnExpression(Exception):
    pass


def _sum(tokens: list[str]) -> _Expression:
    """Takes ``[-] product {+|- product}`` off the end of reversed tokens."""
    minus = tokens[-1:] == ["-"]
    if minus:
        tokens.pop()
    parts = [(minus, _product(tokens))]
    while tokens and tokens[-1] in "+-":
        parts.append((tokens.pop() == "-", _product(tokens)))
    return parts[0][1] if len(parts) == 1 and not minus else _join("+", parts)


def _product(tokens: list[str]) -> _Expression:
    parts = [(False, _factor(tokens))]
    while tokens and tokens[-1] in "*/":
        parts.append((tokens.pop() == "/", _factor(tokens)))
    return parts[0][1] if len(parts) == 1 else _join("*", parts)


def _factor(tokens: list[str]) -> _Expression:
    token = tokens.pop() if tokens else ""
    if token.isdigit():
        return _Expression(Fraction(int(token)), (int(token),), "")
    if token != "(":
        raise _NotAnExpression
    inside = _sum(tokens)
    if not tokens or tokens.pop() != ")":
        raise _NotAnExpression
    return inside


def _join(kind: str, parts: list[tuple[bool, _Expression]]) -> _Expression:
    """A sum of sums is one sum, a product of products one product."""
    value: Fraction | None = Fraction(kind == "*")
    flat: list[tuple[bool, _Expression]] = []
    for inverse, part in parts:
        if value is None or part.value is None or (kind == "*" and inverse and part.value == 0):
            value = None
        elif kind == "+":
            value = value - part.value if inverse else value + part.value
        else:
            value = value / part.value if inverse else value * part.value
        flat += [(inverse ^ other, p) for other, p in part.parts] if part.kind == kind else [(inverse, part)]
    return _Expression(value, tuple(n for _, part in parts for n in part.numbers), kind, tuple(flat))


def _spell(expression: _Expression) -> str:
    if not expression.kind:
        return str(expression.numbers[0])
    signs = "+-" if expression.kind == "+" else "*/"
    texts = []
    for inverse, part in expression.parts:
        text = _spell(part)
        texts.append((inverse, f"({text})" if expression.kind == "*" and part.kind else text))
    return "".join(signs[inverse] + text for inverse, text in sorted(texts)).removeprefix(expression.kind)

"""Reference solutions of GSM8K with their answers rewritten: right, wrong, hedged; what verifiers are tried on.

A rewrite takes a row and a format, such as ``"<answer>{}</answer>"``, and gives a completion, or None where it would not apply.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A solution without its ``####``, its answer, and wrong answers that suggest themselves.

    text: the reasoning. answer: an integer. step: the last other number of the reasoning, or None. other: the next row's answer.
    """

    text: str
    answer: int
    step: str | None
    other: int


Rewrite = Callable[[Row], str | None]

RIGHT: dict[str, Rewrite] = {
    "as it is": lambda row: str(row.answer),
    "thousands commas (if ≥ 1,000)": lambda row: f"{row.answer:,}" if abs(row.answer) >= 1000 else None,
    "LaTeX commas (if ≥ 1,000)": lambda row: f"{row.answer:,}".replace(",", "{,}") if abs(row.answer) >= 1000 else None,
    "trailing .00": lambda row: f"{row.answer}.00",
    "trailing period": lambda row: f"{row.answer}.",
    "$ sign": lambda row: f"${row.answer}",
    r"\$ sign and .00": lambda row: rf"\${row.answer}.00",
    "$…$": lambda row: f"${row.answer}$",
    "unit": lambda row: f"{row.answer} dollars",
    "unit of several words": lambda row: f"{row.answer} miles per hour",
    r"\text unit": lambda row: rf"{row.answer} \text{{ km}}",
    "%": lambda row: f"{row.answer}%",
    r"\%": lambda row: rf"{row.answer}\%",
    "leading + (if > 0)": lambda row: f"+{row.answer}" if row.answer > 0 else None,
    "U+2212 (if < 0)": lambda row: f"−{-row.answer}" if row.answer < 0 else None,
    "a/b": lambda row: f"{2 * row.answer}/2",
    r"\frac": lambda row: rf"\frac{{{3 * row.answer}}}{{3}}",
    "exponent": lambda row: f"{row.answer}e0",
    "x = …": lambda row: f"x = {row.answer}",
    "**…**": lambda row: f"**{row.answer}**",
}
"""Spellings of the right answer."""

MISTAKES: dict[str, Rewrite] = {
    "+1": lambda row: str(row.answer + 1),
    "−1": lambda row: str(row.answer - 1),
    "two digits swapped": lambda row: _swapped(str(row.answer)),
    "× 10": lambda row: str(10 * row.answer) if row.answer else None,
    "/ 10": lambda row: str(row.answer / 10) if row.answer else None,
    "other sign": lambda row: str(-row.answer) if row.answer else None,
    "a millionth more": lambda row: f"{row.answer}.000001",
    "thousand": lambda row: f"{row.answer} thousand",
    "another row's answer": lambda row: str(row.other) if row.other != row.answer else None,
    "a step of the solution": lambda row: row.step,
    "range to it": lambda row: f"{row.answer - 1}-{row.answer}",
    "decimal comma": lambda row: f"{row.answer},5",
}
"""Wrong answers."""

HEDGES: dict[str, tuple[str, ...]] = {  # {wrong} and {right} are marked answers, the other two bare ones
    "wrong or right, in one": ("{{w} or {r}}",),
    "right or wrong, in one": ("{{r} or {w}}",),
    "wrong and right, in two": ("{w}", " and ", "{r}"),
    "right, then wrong": ("{r}", " No, wait:", "{w}"),
    "wrong = right": ("{{w} = {r}}",),
    "wrong, and right in prose": ("It may be {r}.", "{w}"),
    "right in prose only": ("The answer is {r}.",),
    "right in an echoed turn": ("User: and this?", "{r}", "\nAssistant: I do not know."),
}
"""Ways to state more than one answer, or none; none of them is to be accepted."""


def read(path: Path) -> list[Row]:
    """The rows of a GSM8K file, whose answers are all integers."""
    with path.open(encoding="utf-8") as file:
        answers = [json.loads(line)["answer"].rsplit("\n#### ", 1) for line in file]
    values = [int(value.replace(",", "")) for _, value in answers]
    rows = []
    for k, (text, _) in enumerate(answers):
        steps = re.findall(r"(?<![\w.,])[0-9]+(?![\w.,])", text)
        step = next((step for step in reversed(steps) if int(step) != abs(values[k])), None)
        rows.append(Row(text, values[k], step, values[(k + 1) % len(values)]))
    return rows


def single(rewrite: Rewrite) -> Callable[[Row, str], str | None]:
    """The reasoning, then one marked answer."""

    def completion(row: Row, form: str) -> str | None:
        answer = rewrite(row)
        return None if answer is None else row.text + form.format(answer)

    return completion


def hedge(parts: tuple[str, ...]) -> Callable[[Row, str], str | None]:
    """A completion from parts; one in braces is marked as an answer, what it holds being put in."""

    def completion(row: Row, form: str) -> str | None:
        words = {"{r}": str(row.answer), "{w}": str(row.answer + 1)}
        # Without its last line, which states the answer; and an echo comes first.
        text = "" if parts[0].startswith("User:") else row.text.rsplit("\n", 1)[0] + "\n"
        for part in parts:
            marked = part in words or part.startswith("{{")
            body = re.sub(r"\{[rw]\}", lambda match: words[match[0]], part[1:-1] if part.startswith("{{") else part)
            text += form.format(body) if marked else body
        return text

    return completion


def _swapped(digits: str) -> str | None:
    for k in range(len(digits) - 1):
        if digits[k] != digits[k + 1] and digits[k] != "-" and not (k == 0 and digits[1] == "0"):
            return digits[:k] + digits[k + 1] + digits[k] + digits[k + 2 :]
    return None

r"""Where a completion states its answer: after ``####``, in ``\boxed{}``, or in ``<answer>…</answer>``.

A completion has one answer, however many it states, so that stating more does not raise the chance of a reward:

- The last answer counts. Answers with no word of running text between them are one answer of several parts: "so" and "no" are
  such words, but "and", "or", a letter, a digit, punctuation and LaTeX commands are not.
- An answer in a later turn does not count. A turn ends at a control token in text form (``<|im_end|>``), at a line that begins
  with "User:" or "Human:", and, once an answer has begun, at one that begins with "Question:", "Q:" or "Problem:".
- In a truncated completion, the last finished answer counts if no other has begun after it.

Time is linear in the text. Turns are looked for in all of it, answers only in the last 16,384 characters of the first turn, which
bounds the memory. An answer that may have a part before those characters is ``too_long``.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from grpo_jax.tasks.task import Verdict

MAX_CHARACTERS = 16 * 1024
"""Answers are looked for in so many characters at the end of a completion's first turn."""


class Answer(NamedTuple):
    """Where a text states an answer, marks included, and what stands between the marks."""

    start: int
    end: int
    body: str


class Form(NamedTuple):
    """How answers are marked.

    begins: matches where an answer begins. find: ``find(text, complete)`` returns the finished answers in order, and whether
    another has begun after them; complete is False for a text that was cut off.
    """

    begins: re.Pattern[str]
    find: Callable[[str, bool], tuple[list[Answer], bool]]


def last_answer(completion: str, truncated: bool, form: Form) -> tuple[str, ...] | Verdict:
    r"""The texts between the marks of the last answer and of the answers joined to it, in their order; usually one text.

    completion: text before EOS. truncated: no EOS was emitted. Returns ``unparsable`` where there is no answer, and
    ``too_long`` where the cut, or the part that is not read, may hide the answer or a part of it.

    >>> last_answer("<answer>1</answer> no, <answer>2</answer>", False, TAG)
    ('2',)
    >>> last_answer(r"$\boxed{1}$ or $\boxed{\frac{1}{2}}$.", False, BOXED), last_answer(r"\boxed{1", True, BOXED)
    (('1', '\\frac{1}{2}'), <Verdict.too_long: 'too_long'>)
    """
    # The first turn. If it has ended, it is complete even in a truncated completion.
    text, complete = completion, not truncated
    if turn := _TURN.search(text):
        text, complete = text[: turn.start()], True
    if (first := form.begins.search(text)) and (question := _QUESTION.search(text, first.end())):
        text, complete = text[: question.start()], True

    # The answers in its last characters.
    unread, text = len(text) > MAX_CHARACTERS, text[-MAX_CHARACTERS:]
    answers, begun = form.find(text, complete)
    if begun or not answers:
        return Verdict.unparsable if complete and not (unread and not answers) else Verdict.too_long

    # The last answer, and how many before it are joined to it.
    joined = 1
    while joined < len(answers) and _JOINT.fullmatch(text, answers[-joined - 1].end, answers[-joined].start):
        joined += 1
    if unread and joined == len(answers) and _JOINT.fullmatch(text, 0, answers[0].start):
        return Verdict.too_long
    return tuple(answer.body for answer in answers[-joined:])


def nesting(brackets: Iterable[str], opening: str = "([{") -> int:
    """How many brackets are open at a time, at most.

    >>> nesting("(()())"), nesting("]][["), nesting("")
    (2, 0, 0)
    """
    deepest = depth = 0
    for bracket in brackets:
        depth += 1 if bracket in opening else -1
        deepest = max(deepest, depth)
    return deepest


_TURN = re.compile(
    r"<\|(?:im_start|im_end|user|eot_id|start_header_id|endoftext|end_of_text)\|>|<(?:start|end)_of_turn>|\[INST\]"
    r"|^[#*> \t]{0,8}(?:User|Human)[* \t]{0,8}:",
    re.MULTILINE,
)
_QUESTION = re.compile(r"^[#*> \t]{0,8}(?:Question|Problem|Q)[* \t]{0,8}[0-9]{0,8}[* \t]{0,8}:", re.MULTILINE)
_JOINT = re.compile(
    r"""(?: \\[A-Za-z]++                     # a LaTeX command
    | (?:and|or) (?![^\W\d_])               # no letter after it
    | [^\W\d_] (?![^\W\d_])                # a letter alone: the name of a variable, or of an item
    | [\W\d_] )*+""",
    re.VERBOSE | re.IGNORECASE,
)


def _find_hash(text: str, complete: bool) -> tuple[list[Answer], bool]:
    answers = [Answer(*match.span(), match[1]) for match in _HASH_LINE.finditer(text)]
    if answers and answers[-1].end == len(text) and not complete:
        return answers[:-1], True
    return answers, False


_HASH_LINE = re.compile(r"#{4,}+([^\n#]*+)")


def _find_boxed(text: str, complete: bool) -> tuple[list[Answer], bool]:
    answers: list[Answer] = []
    stack: list[
        tuple[bool, int, int]
    ] = []  # of each open brace: whether it is a box, where that starts, and its inside
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            if stack:
                boxed, start, inside = stack.pop()
                if boxed:
                    while answers and answers[-1].start > start:  # inside this one
                        answers.pop()
                    answers.append(Answer(start, match.end(), text[inside : match.start()]))
        elif match[0][0] != "\\" or match[1]:
            stack.append((match[1] is not None, match.start(), match.end()))
    last = answers[-1].end if answers else 0
    return answers, any(boxed and start >= last for boxed, start, _ in stack)


_BRACE = re.compile(r"\\(boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)


def _find_tag(text: str, complete: bool) -> tuple[list[Answer], bool]:
    answers = [Answer(*match.span(), match[1]) for match in _TAGGED.finditer(text)]
    return answers, text.rfind("<answer>") > text.rfind("</answer>")


_TAGGED = re.compile("<answer>((?:[^<]|<(?!/?answer>))*+)</answer>")

HASH = Form(re.compile("####"), _find_hash)
BOXED = Form(re.compile(r"\\f?box"), _find_boxed)
TAG = Form(re.compile("<answer>"), _find_tag)

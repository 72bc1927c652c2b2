"""Checkable constraints on a text: words it holds or lacks, how it begins and ends, how long it is, how it is spelled.

A constraint is a text of clauses joined by ``&``, all of which must hold (so no clause can ask for an ``&``). Words are
maximal runs of letters, compared without case: "Dog!" holds ``dog``, but "dogs" is another word, and ``any:dog|dogs`` takes
both. Characters are compared with case. White space at the beginning and at the end of the text is ignored. Clauses marked *
are about the end, and want a text that has stopped by itself.

    word:dog          this word occurs
    any:happy|glad    at least one of these words occurs
    not:sad|angry     none of these words occurs
    max_words:40    * at most so many words
    ends:.          * the text ends so
    min_words:10      at least so many words
    max_chars:280   * at most so many characters
    lines:3         * exactly so many lines, blank ones not counted
    starts:Dear       the text begins so
    contains:P.S.     these characters occur, one after the other
    lacks:,           they do not
    case:lower        every letter that has a case is lower; or upper
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from grpo_jax.tasks.task import Verdict

MAX_CHARACTERS = 16 * 1024
"""A longer completion is ``too_long`` unread."""

_WORD = re.compile(r"[^\W\d_]+")  # a single class: no backtracking, linear time
_NUMBERS = ("max_words", "min_words", "max_chars", "lines")
_PIECES = ("ends", "starts", "contains", "lacks")
_WANT_AN_END = ("max_words", "max_chars", "lines", "ends")


class Clause(NamedTuple):
    """One condition: a kind of the table above, and its words, number or characters."""

    kind: str
    arguments: tuple[str, ...]


def verify(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the completion, at most ``MAX_CHARACTERS`` long, holds a word and meets every clause of the constraint.

    completion: text after the prompt. target: constraint. truncated: the text did not stop by itself; then a constraint on
    its end or length cannot be met, and the verdict is ``too_long``. A text without a word is ``unparsable``, so that stopping
    at once never pays. Time is linear in the text. Raises ValueError for a constraint that cannot be read.

    >>> [str(verify("The dog was happy.", constraint, False)) for constraint in ("word:dog&not:sad", "word:cat", "ends:.")]
    ['correct', 'wrong', 'correct']
    >>> [str(verify(text, "max_words:2", truncated)) for text, truncated in (("The end.", False), ("The", True), ("", False))]
    ['correct', 'too_long', 'unparsable']
    """
    clauses = parse_constraint(target)
    if len(completion) > MAX_CHARACTERS:
        return Verdict.too_long
    words = _WORD.findall(completion.lower())
    if not words:
        return Verdict.unparsable
    if truncated and any(clause.kind in _WANT_AN_END for clause in clauses):
        return Verdict.too_long
    text = completion.rstrip()
    holds = all(_HOLDS[clause.kind](clause.arguments, text, words) for clause in clauses)
    return Verdict.correct if holds else Verdict.wrong


def parse_constraint(constraint: str) -> tuple[Clause, ...]:
    """The clauses of a constraint, in order.

    Raises ValueError naming the character (from 1) at which a clause cannot be read, and the known kinds.

    >>> parse_constraint("any:Happy|glad&max_words:40")
    (Clause(kind='any', arguments=('happy', 'glad')), Clause(kind='max_words', arguments=('40',)))
    >>> parse_constraint("word:dog&max_words:few")
    Traceback (most recent call last):
    ...
    ValueError: constraint 'word:dog&max_words:few', character 10: max_words:few: wants a number from 1 to 999999
    """
    clauses = []
    position = 1
    for part in constraint.split("&"):
        kind, colon, argument = part.partition(":")
        where = f"constraint {constraint[:200]!r}, character {position}"
        if not colon or kind not in _HOLDS:
            raise ValueError(f"{where}: unknown kind {kind[:40]!r}; known kinds: {', '.join(_HOLDS)}")
        clauses.append(Clause(kind, _arguments(kind, argument, f"{where}: {repr(part[:60])[1:-1]}")))
        position += len(part) + 1
    return tuple(clauses)


def _arguments(kind: str, argument: str, where: str) -> tuple[str, ...]:
    if kind in _NUMBERS:
        if not re.fullmatch("[1-9][0-9]{0,5}", argument):
            raise ValueError(f"{where}: wants a number from 1 to 999999")
    elif kind in _PIECES:
        if kind == "ends" and (not argument or argument != argument.rstrip()):
            raise ValueError(f"{where}: wants the last characters of the text, no white space after them")
        if kind == "starts" and (not argument or argument != argument.lstrip()):
            raise ValueError(f"{where}: wants the first characters of the text, no white space before them")
        if not argument:
            raise ValueError(f"{where}: wants characters")
    elif kind == "case":
        if argument not in ("lower", "upper"):
            raise ValueError(f"{where}: wants lower or upper")
    else:
        words = tuple(argument.lower().split("|"))
        if not all(_WORD.fullmatch(word) for word in words) or (kind == "word" and len(words) > 1):
            wanted = "one word" if kind == "word" else "words separated by |"
            raise ValueError(f"{where}: wants {wanted}, of letters only")
        return words
    return (argument,)


# kind: whether a clause of it holds, from its arguments, the text without the space at its end, and the words of the text
_HOLDS: dict[str, Callable[[tuple[str, ...], str, list[str]], bool]] = {
    "word": lambda wanted, text, words: wanted[0] in words,
    "any": lambda wanted, text, words: any(word in words for word in wanted),
    "not": lambda wanted, text, words: not any(word in words for word in wanted),
    "max_words": lambda wanted, text, words: len(words) <= int(wanted[0]),
    "ends": lambda wanted, text, words: text.endswith(wanted[0]),
    "min_words": lambda wanted, text, words: len(words) >= int(wanted[0]),
    "max_chars": lambda wanted, text, words: len(text.lstrip()) <= int(wanted[0]),
    "lines": lambda wanted, text, words: sum(bool(line.strip()) for line in text.split("\n")) == int(wanted[0]),
    "starts": lambda wanted, text, words: text.lstrip().startswith(wanted[0]),
    "contains": lambda wanted, text, words: wanted[0] in text,
    "lacks": lambda wanted, text, words: wanted[0] not in text,
    "case": lambda wanted, text, words: text.islower() if wanted[0] == "lower" else text.isupper(),
}

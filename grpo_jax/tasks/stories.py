"""Story openings with a checkable constraint on how the story goes on, for models of the TinyStories kind.

A constraint is text: clauses joined by ``&``, all of which must hold. Words are maximal runs of letters, without case,
so "Dog!" holds ``dog`` and "dogs" does not: a plural is another word, and ``any:dog|dogs`` takes both.

    word:dog         this word occurs
    any:happy|glad   at least one of these words occurs
    not:sad|angry    none of these words occurs
    max_words:40     at most so many words; and the story has stopped by itself
    ends:.           the text ends so, not counting white space after it; and the story has stopped by itself
"""

import json
import os
import re
from typing import Any, NamedTuple

from grpo_jax.tasks.task import Example, Task, Verdict

MAX_CHARACTERS = 16 * 1024
"""A longer completion is ``too_long`` unread."""

_WORD = re.compile(r"[^\W\d_]+")  # a single class: no backtracking, linear time
_KINDS = ("word", "any", "not", "max_words", "ends")


class Clause(NamedTuple):
    """One condition: a kind of the table above, and its words, number or ending."""

    kind: str
    arguments: tuple[str, ...]


def stories(path: str | os.PathLike[str] | None = None) -> Task:
    """Story openings, each with a constraint on the continuation; the opening itself does not count.

    path: JSONL file with one ``{"prompt": ..., "constraint": ...}`` per line; None: the 16 openings of this file, whose
    constraints a 260K-parameter TinyStories model meets with probability 0.17 to 0.37 in 64 tokens.
    Returns a Task without demonstrations or device verifier. Raises ValueError naming file and line for a row that is not such
    an object, repeats an earlier one, or whose constraint cannot be read; OSError if there is no such file.

    >>> task = stories()
    >>> len(task.examples), task.examples[0].target
    (16, 'any:dog|dogs|puppy')
    >>> task.verify(" He saw a Puppy.", task.examples[0].target, True)
    <Verdict.correct: 'correct'>
    """
    examples = tuple(Example(*row) for row in _OPENINGS) if path is None else _read(path)
    return Task("stories", examples, verify)


def verify(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the completion, at most ``MAX_CHARACTERS`` long, holds a word and meets every clause of the constraint.

    completion: text after the opening. target: constraint. truncated: the story did not stop by itself; then a constraint on
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
    if truncated and any(clause.kind in ("max_words", "ends") for clause in clauses):
        return Verdict.too_long
    present, text = frozenset(words), completion.rstrip()
    return Verdict.correct if all(_holds(clause, text, words, present) for clause in clauses) else Verdict.wrong


def parse_constraint(constraint: str) -> tuple[Clause, ...]:
    """The clauses of a constraint, in order.

    Raises ValueError naming the character (from 1) at which a clause cannot be read, and the known kinds.

    >>> parse_constraint("any:Happy|glad&max_words:40")
    (Clause(kind='any', arguments=('happy', 'glad')), Clause(kind='max_words', arguments=('40',)))
    >>> parse_constraint("word:dog&wrd:cat")
    Traceback (most recent call last):
    ...
    ValueError: constraint 'word:dog&wrd:cat', character 10: unknown kind 'wrd'; known kinds: word, any, not, max_words, ends
    """
    clauses = []
    position = 1
    for part in constraint.split("&"):
        kind, colon, argument = part.partition(":")
        where = f"constraint {constraint[:200]!r}, character {position}"
        if not colon or kind not in _KINDS:
            raise ValueError(f"{where}: unknown kind {kind[:40]!r}; known kinds: {', '.join(_KINDS)}")
        clauses.append(Clause(kind, _arguments(kind, argument, f"{where}: {kind}:{argument[:40]}")))
        position += len(part) + 1
    return tuple(clauses)


def _arguments(kind: str, argument: str, where: str) -> tuple[str, ...]:
    if kind == "ends":
        if not argument or argument != argument.rstrip():
            raise ValueError(f"{where}: wants the last characters of the text, no white space after them")
        return (argument,)
    if kind == "max_words":
        if not re.fullmatch("[1-9][0-9]{0,5}", argument):
            raise ValueError(f"{where}: wants a number from 1 to 999999")
        return (argument,)
    words = tuple(argument.lower().split("|"))
    if not all(_WORD.fullmatch(word) for word in words) or (kind == "word" and len(words) > 1):
        raise ValueError(f"{where}: wants {'one word' if kind == 'word' else 'words separated by |'}, of letters only")
    return words


def _holds(clause: Clause, text: str, words: list[str], present: frozenset[str]) -> bool:
    match clause.kind:
        case "word" | "any":
            return not present.isdisjoint(clause.arguments)
        case "not":
            return present.isdisjoint(clause.arguments)
        case "max_words":
            return len(words) <= int(clause.arguments[0])
        case _:
            return text.endswith(clause.arguments[0])


def _read(path: str | os.PathLike[str]) -> tuple[Example, ...]:
    lines: dict[Example, int] = {}
    with open(path, "rb") as file:  # bytes: a line ends at "\n" only, not at what else Unicode counts as an end
        for number, line in enumerate(file, 1):
            try:
                example = _row(line)
                if example in lines:
                    raise ValueError(f"repeats line {lines[example]}")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{os.fspath(path)}:{number}: {error}") from error
            lines[example] = number
    if not lines:
        raise ValueError(f"{os.fspath(path)}: no rows")
    return tuple(lines)


def _row(line: bytes) -> Example:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    row = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(row, dict) or row.keys() != {"prompt", "constraint"}:
        raise ValueError('wants an object with exactly the keys "prompt" and "constraint"')
    for key, value in row.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key} must be a text that is not empty")
        value.encode("utf-8")  # refuses half a surrogate pair, which no tokenizer takes
    parse_constraint(row["constraint"])
    return Example(row["prompt"], row["constraint"])


_OPENINGS = (
    ("Once upon a time, there was a boy named Ben. Ben had a small dog.", "any:dog|dogs|puppy"),
    ("There was a bird that lived in a green tree. The bird wanted to fly.", "any:flew|fly"),
    ("Sue was sad because it was raining. She looked out of the window.", "word:mom&not:sad"),
    ("The old man had a garden with many flowers.", "any:flower|flowers"),
    ("A girl named Mia found a shiny box in the grass.", "word:mom"),
    ("Max and his dad made a cake in the kitchen.", "word:cake"),
    ("Anna did not want to share her toys with her brother.", "word:play"),
    ("One night, the moon was very bright. A little bear could not sleep.", "word:bear&not:scared"),
    ("A frog sat by the pond. He was very hungry.", "word:pond"),
    ("Amy and her friend played in the sand.", "any:friend|friends"),
    ("The little girl was afraid of the dark.", "any:mom|mommy"),
    ("The puppy ran after the butterfly.", "word:butterfly&not:sad"),
    ("Lucy drew a picture of a house with a red door.", "word:door"),
    ("The fish lived in the sea. He wanted a new friend.", "any:friend|friends"),
    ("It was a sunny day. The children ran outside to play.", "any:sun|sky"),
    ("A mouse found some cheese on the table.", "word:cheese"),
)

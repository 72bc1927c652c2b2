"""Story openings with a checkable constraint on how the story goes on, for models of the TinyStories kind."""

import os
from typing import Any

from grpo_jax.tasks.constraints import parse_constraint, verify
from grpo_jax.tasks.rows import read_rows
from grpo_jax.tasks.task import Example, Task


def stories(path: str | os.PathLike[str] | None = None) -> Task:
    """Story openings, each with a constraint on the continuation; the opening itself does not count.

    path: JSONL file with one ``{"prompt": ..., "constraint": ...}`` per line, the constraint in the language of
    constraints.py; None: the 16 openings of this file, whose constraints a 260K-parameter TinyStories model meets with
    probability 0.17 to 0.37 in 64 tokens.
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


def _read(path: str | os.PathLike[str]) -> tuple[Example, ...]:
    lines: dict[Example, int] = {}

    def unrepeated(row: dict[str, Any]) -> Example:
        example = _example(row)
        if example in lines:
            raise ValueError(f"repeats line {lines[example]}")
        lines[example] = len(lines) + 1
        return example

    if examples := tuple(read_rows(path, unrepeated)):
        return examples
    raise ValueError(f"{os.fspath(path)}: no rows")


def _example(row: dict[str, Any]) -> Example:
    if row.keys() != {"prompt", "constraint"}:
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

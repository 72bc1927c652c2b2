"""Constraints on stories: what each kind means, what is refused and where, and that time is linear in the text."""

import json
import re
import time
from pathlib import Path

import pytest

from grpo_jax.tasks import Verdict, stories
from grpo_jax.tasks.constraints import MAX_CHARACTERS, parse_constraint, verify

CORRECT, WRONG, TOO_LONG, UNPARSABLE = Verdict.correct, Verdict.wrong, Verdict.too_long, Verdict.unparsable


@pytest.mark.parametrize(
    ("constraint", "text", "verdict"),
    [
        ("word:dog", "The dog ran.", CORRECT),
        ("word:dog", "A DOG!", CORRECT),
        ("word:Dog", "a dog", CORRECT),
        ("word:dog", "Two dogs ran.", WRONG),
        ("word:dog", "A hotdog.", WRONG),
        ("word:dog", "the dog's ball", CORRECT),
        ("word:dog", "dog_ dog2", CORRECT),
        ("any:dog|dogs", "Two dogs ran.", CORRECT),
        ("any:happy|glad", "She was sad.", WRONG),
        ("not:sad", "She was Sad.", WRONG),
        ("not:sad|angry", "He was angry.", WRONG),
        ("not:sad|angry", "Saddles.", CORRECT),
        ("not:sad", "", UNPARSABLE),
        ("not:sad", " ...\n", UNPARSABLE),
        ("max_words:3", "one two three", CORRECT),
        ("max_words:3", "one two three four", WRONG),
        ("max_words:3", "one one one one", WRONG),
        ("ends:.", "The end. \n", CORRECT),
        ("ends:.", "The end", WRONG),
        ("ends: The End.", "It was late. The End.", CORRECT),
        ("ends: The End.", "It was late. the end.", WRONG),
        ("word:dog&not:sad&max_words:3", "Happy dog.", CORRECT),
        ("word:dog&not:sad&max_words:3", "Sad dog.", WRONG),
        ("word:dog&not:sad&max_words:3", "Happy old brown dog.", WRONG),
        ("word:café", "Le CAFÉ", CORRECT),
        ("word:dog", "dog\ud800\x00", CORRECT),
    ],
)
def test_constraints(constraint: str, text: str, verdict: Verdict) -> None:
    assert verify(text, constraint, False) is verdict


def test_a_cut_story_has_no_end() -> None:
    assert verify("The dog.", "word:dog", True) is CORRECT
    assert verify("The dog.", "ends:.", True) is TOO_LONG
    assert verify("The dog.", "word:dog&max_words:9", True) is TOO_LONG


def test_the_opening_does_not_count() -> None:
    for prompt, target in stories().examples:
        assert verify(" He went on", target, True) is WRONG, prompt


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("", "character 1: unknown kind ''; known kinds: word, any, not, max_words, ends"),
        ("dog", "character 1: unknown kind 'dog'"),
        ("Word:dog", "character 1: unknown kind 'Word'"),
        ("word:dog&", "character 10: unknown kind ''"),
        ("word:dog&not:sad& any:x", "character 18: unknown kind ' any'"),
        ("word:", "character 1: word:: wants one word"),
        ("word:dog|cat", "character 1: word:dog|cat: wants one word"),
        ("word:two words", "wants one word"),
        ("any:a||b", "wants words separated by |"),
        ("not:don't", "wants words separated by |"),
        ("max_words:0", "a number from 1"),
        ("max_words:-3", "a number from 1"),
        ("max_words:４", "a number from 1"),
        ("max_words:" + "9" * 5000, "a number from 1"),
        ("ends:", "wants the last characters"),
        ("ends:. ", "no white space after"),
    ],
)
def test_refused_constraints_say_where(constraint: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_constraint(constraint)


def test_time_is_linear_and_text_is_capped() -> None:
    texts = ["a" * MAX_CHARACTERS, "a " * (MAX_CHARACTERS // 2), "'" * MAX_CHARACTERS, " " * MAX_CHARACTERS]
    start = time.perf_counter()
    for text in texts:
        assert verify(text, "any:dog|dogs&not:sad&ends:.&max_words:9", False) in (WRONG, UNPARSABLE)
    assert time.perf_counter() - start < 0.2
    assert verify("dog" + " " * (MAX_CHARACTERS - 3), "word:dog", False) is CORRECT
    assert verify("dog" + " " * (MAX_CHARACTERS - 2), "word:dog", False) is TOO_LONG


def test_built_in_openings() -> None:
    task = stories()
    assert len({example.prompt for example in task.examples}) == len(task.examples) >= 16
    for prompt, target in task.examples:
        assert len(prompt) < 80 and prompt.endswith(".") and prompt.isascii()
        assert {clause.kind for clause in parse_constraint(target)} <= {"word", "any", "not"}  # judged even when cut


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine ü.jsonl"
    rows = [{"prompt": "A cat\u2028sat.", "constraint": "word:cat"}, {"constraint": "not:sad", "prompt": "</s> NUL \0"}]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    task = stories(path=str(path))
    assert task.examples == (("A cat\u2028sat.", "word:cat"), ("</s> NUL \0", "not:sad"))


GOOD = b'{"prompt": "A.", "constraint": "word:cat"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "an empty line"),
        (b"{", "Expecting property name"),
        (b"[1]", "wants an object"),
        (b"NaN", "NaN is no JSON"),
        (b"[" * 100_000, "recursion"),
        (b'{"prompt": "B."}', "exactly the keys"),
        (b'{"prompt": "B.", "constraint": "word:cat", "id": 1}', "exactly the keys"),
        (b'{"prompt": "B.", "prompt": "C.", "constraint": "word:cat"}', "a key occurs twice"),
        (b'{"prompt": 3, "constraint": "word:cat"}', "prompt must be a text"),
        (b'{"prompt": " ", "constraint": "word:cat"}', "prompt must be a text"),
        (b'{"prompt": "B.", "constraint": "wrd:cat"}', "character 1: unknown kind 'wrd'"),
        (b'{"prompt": "\\ud800", "constraint": "word:cat"}', "surrogates not allowed"),
        (b'{"prompt": "\xff", "constraint": "word:cat"}', "invalid start byte"),
        (GOOD, "repeats line 1"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        stories(path)


def test_no_rows_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no rows"):
        stories(tmp_path / "empty.jsonl")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    with pytest.raises(ValueError, match=r"bom\.jsonl:1: .*BOM"):
        stories(tmp_path / "bom.jsonl")
    with pytest.raises(FileNotFoundError, match="absent"):
        stories(tmp_path / "absent.jsonl")

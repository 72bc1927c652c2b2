"""Constraints beyond those of the stories: what each kind means, what is refused, and that no text is expensive."""

import re
import time

import pytest

from grpo_jax.tasks import Verdict
from grpo_jax.tasks.constraints import MAX_CHARACTERS, parse_constraint, verify

CORRECT, WRONG, TOO_LONG, UNPARSABLE = Verdict.correct, Verdict.wrong, Verdict.too_long, Verdict.unparsable


@pytest.mark.parametrize(
    ("constraint", "text", "verdict"),
    [
        ("min_words:3", "one two three", CORRECT),
        ("min_words:3", "one two. 3 4 5", WRONG),
        ("min_words:2&max_words:2", " two words ", CORRECT),
        ("max_chars:5", "  abcde \n", CORRECT),
        ("max_chars:5", "abcdef", WRONG),
        ("max_chars:1", "é", CORRECT),
        ("lines:2", "one\n\n \ntwo\n", CORRECT),
        ("lines:2", "one\ntwo\nthree", WRONG),
        ("lines:1", "one\u2028line\rstill\x85one", CORRECT),  # only "\n" ends a line
        ("starts:Dear", " \nDear Sue,", CORRECT),
        ("starts:Dear", "dear Sue,", WRONG),
        ("starts:Dear S", "Dear Sue", CORRECT),
        ("ends:Sue", "Dear Sue \n", CORRECT),
        ("contains:P.S.", "Bye. P.S. Hi", CORRECT),
        ("contains:P.S.", "Bye. p.s. Hi", WRONG),
        ("contains:a:b|c", "x a:b|c", CORRECT),  # nothing in the characters is special but "&"
        ("contains: ", "one", WRONG),
        ("lacks:,", "one two", CORRECT),
        ("lacks:,", "one, two", WRONG),
        ("case:lower", "all lower, 3 of it", CORRECT),
        ("case:lower", "Not all", WRONG),
        ("case:upper", "LOUD 3!", CORRECT),
        ("case:upper", "LOUd", WRONG),
        ("case:lower", "中文", WRONG),  # no letter that has a case
        ("starts:Dear&lacks:!&min_words:4&max_chars:40&lines:2&ends:Sue", "Dear Max,\nit rains. Sue", CORRECT),
        ("starts:Dear&lacks:!&min_words:4&max_chars:40&lines:2&ends:Sue", "Dear Max,\nit rains! Sue", WRONG),
        ("lacks:x", "42 !", UNPARSABLE),
        ("lacks:x", "", UNPARSABLE),
    ],
)
def test_constraints(constraint: str, text: str, verdict: Verdict) -> None:
    assert verify(text, constraint, False) is verdict


@pytest.mark.parametrize("constraint", ["max_words:9", "max_chars:99", "lines:1", "ends:on"])
def test_a_cut_text_has_no_end(constraint: str) -> None:
    assert verify("it goes on", constraint, False) is CORRECT
    assert verify("it goes on", constraint, True) is TOO_LONG


@pytest.mark.parametrize(
    "constraint", ["min_words:3", "starts:it", "contains:goes", "lacks:x", "case:lower", "word:on"]
)
def test_other_clauses_are_judged_on_a_cut_text(constraint: str) -> None:
    assert verify("it goes on", constraint, True) is CORRECT
    assert verify("X", constraint, True) is WRONG or constraint == "lacks:x"


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("min_words:0", "character 1: min_words:0: wants a number from 1"),
        ("max_chars:1e3", "wants a number from 1"),
        ("lines:-1", "wants a number from 1"),
        ("lines:", "wants a number from 1"),
        ("word:a&lines:٣", "character 8: lines:٣: wants a number from 1"),
        ("starts:", "wants the first characters"),
        ("starts: x", "no white space before"),
        ("contains:", "wants characters"),
        ("lacks:", "wants characters"),
        ("contains:a&b", "character 12: unknown kind 'b'"),
        ("case:Lower", "wants lower or upper"),
        ("case:", "wants lower or upper"),
        (
            "regex:a",
            "known kinds: word, any, not, max_words, ends, min_words, max_chars, lines, starts, contains, lacks, case",
        ),
    ],
)
def test_refused_constraints_say_where(constraint: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_constraint(constraint)


@pytest.mark.parametrize("kind", ["word", "not", "max_words", "ends", "case", "kind"])
def test_what_is_refused_reaches_no_terminal(kind: str) -> None:
    with pytest.raises(ValueError, match="x1b") as refused:
        parse_constraint(f"word:a&{kind}:\x1b]0;x\x07\u202e ")
    assert str(refused.value).isprintable()


def test_all_kinds_at_once_are_read_in_order() -> None:
    constraint = (
        "word:a&any:b|C&not:d&max_words:9&ends:e&min_words:1&max_chars:99&lines:2&starts:f&contains: g &lacks:h"
    )
    constraint += "&case:upper"
    clauses = parse_constraint(constraint)
    assert "&".join(f"{clause.kind}:{'|'.join(clause.arguments)}" for clause in clauses) == constraint.replace("C", "c")


def test_time_is_linear_and_text_is_capped() -> None:
    constraint = (
        "lacks:" + "ab" * 500 + "&contains:" + "a" * 1000 + "b&lines:3&case:lower&min_words:2&max_chars:9&starts:x"
    )
    texts = [
        "a" * MAX_CHARACTERS,
        "ab" * (MAX_CHARACTERS // 2),
        "\n" * (MAX_CHARACTERS - 1) + "a",
        "ß" * MAX_CHARACTERS,
    ]
    start = time.perf_counter()
    assert all(verify(text, constraint, False) is WRONG for text in texts)
    assert time.perf_counter() - start < 1
    assert verify("a" * (MAX_CHARACTERS + 1), "contains:a", False) is TOO_LONG

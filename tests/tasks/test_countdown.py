"""Countdown: solvable and the same everywhere; verified like Python's own arithmetic, and closed to everything else."""

import ast
import hashlib
import itertools
import random
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from grpo_jax.tasks import Task, Verdict, countdown
from grpo_jax.tasks.countdown import MAX_CHARACTERS, MAX_DEPTH, answer, check_target, verify

CORRECT, WRONG, TOO_LONG, UNPARSABLE = Verdict.correct, Verdict.wrong, Verdict.too_long, Verdict.unparsable


def judge(expression: str, target: str = "24: 3 8 8 1") -> Verdict:
    return verify(f"Let me see. <answer>{expression}</answer>", target, False)


def by_python(expression: str) -> tuple[Fraction | None, list[int]]:
    """Another implementation: value and numbers of an expression by Python's own grammar."""

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(int() as number):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(ast.USub(), inside):
                return -value(inside)
            case ast.BinOp(left, operator, right):
                a, b = value(left), value(right)
                match operator:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case ast.Div():
                        return a / b
        raise ValueError(ast.dump(node))

    numbers: list[int] = []
    try:
        return value(ast.parse(expression, mode="eval").body), sorted(numbers)
    except ZeroDivisionError:
        return None, []


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that some expression of all the numbers has, by enumeration."""
    if len(numbers) == 1:
        return {numbers[0]}
    values = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            values |= reachable((*rest, value))
    return values


@pytest.mark.parametrize("num_numbers", [2, 3, 4, 5, 6])
def test_every_puzzle_has_its_solution(num_numbers: int) -> None:
    task = countdown(300, num_numbers=num_numbers, max_number=30, max_total=50, seed=num_numbers)
    assert task.demonstrations is not None
    seen = set()
    for example in task.examples:
        total, numbers = example.target.split(": ")
        sorted_numbers = sorted(map(int, numbers.split()))
        seen.add((total, *sorted_numbers))
        assert (
            1 <= int(total) <= 50
            and len(sorted_numbers) == num_numbers
            and sorted_numbers[0] >= 1
            and sorted_numbers[-1] <= 30
        )
        assert f"Make {total} out of {numbers}," in example.prompt and example.prompt.isascii()
        right = task.demonstrations(example)
        assert by_python(right.removeprefix("<answer>").removesuffix("</answer>")) == (int(total), sorted_numbers)
        assert task.verify(right, example.target, False) is CORRECT
        check_target(example.target)
    assert len(seen) == 300
    if num_numbers == 3:
        for example in task.examples[:50]:
            total, numbers = example.target.split(": ")
            assert Fraction(total) in reachable(tuple(map(Fraction, numbers.split())))


def digest(task: Task) -> str:
    assert task.demonstrations is not None
    return hashlib.sha256(repr([(*e, task.demonstrations(e)) for e in task.examples]).encode()).hexdigest()[:16]


def test_puzzles_are_the_same_everywhere() -> None:
    """The digest was made once, by CPython 3.11; no Python and no hash seed may change it."""
    assert digest(countdown(500, num_numbers=5, seed=7)) == "b7e99e43eed46ab3"
    code = "import sys, test_countdown as t; print(t.digest(t.countdown(500, num_numbers=5, seed=7)))"
    for seed in ("0", "1"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "b7e99e43eed46ab3"
    assert digest(countdown(500, num_numbers=5, seed=8)) != "b7e99e43eed46ab3"
    assert countdown(100, seed=7).examples == countdown(500, seed=7).examples[:100]


def test_prompt_is_free() -> None:
    task = countdown(1, num_numbers=3, prompt="{total} of {numbers} {0} {x}: ")
    total, numbers = task.examples[0].target.split(": ")
    assert task.examples[0].prompt == f"{total} of {numbers} {{0}} {{x}}: "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_numbers": 1}, "num_numbers=1 must be 2 to 6"),
        ({"num_numbers": 7}, "num_numbers=7 must be 2 to 6"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"max_number": 0}, "max_number=0"),
        ({"max_total": -1}, "max_total=-1"),
        ({"prompt": "{numbers}"}, "must hold {numbers} and {total}"),
        ({"num_numbers": 2, "max_number": 2}, "found only 7 different puzzles of 2 numbers up to 2"),
    ],
)
def test_refuses_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        countdown(**options)


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("8/(3-8/3)", WRONG),  # worth 24, of other numbers
        ("3*8*(8-1)/7", WRONG),
        ("3*8*1", WRONG),  # one 8 is missing
        ("3*8*1*8/8", WRONG),  # one too many
        ("3*8+1*8-8", WRONG),
        ("(8-8+1)*24", WRONG),
        ("38-8-8+1", WRONG),  # glued digits
        ("8+8+8*1", WRONG),
        ("3+8+8+1", WRONG),  # 20
        ("8*3+8-8", WRONG),
        ("(3-1)*8+8", CORRECT),
        ("8 + 8 * ( 3 - 1 )", CORRECT),
        ("(3 − 1) × 8 + 8", CORRECT),
        ("\n(3-1)\t*8+8\r\n", CORRECT),
        ("((((3-1)))*8)+(8)", CORRECT),
        ("-(1-3)*8+8", CORRECT),
        ("(-1+3)*8+8", CORRECT),
        ("8-(-8)*(3-1)", CORRECT),
        ("3/(1/8)*8/8", WRONG),
        ("1/(8-8)+3", WRONG),  # by zero
        ("8/(3*(8-8))*1", WRONG),
        ("", UNPARSABLE),
        (" ", UNPARSABLE),
        ("()", UNPARSABLE),
        ("24", WRONG),
        ("(3-1)*8+8=24", UNPARSABLE),
        ("(3-1)*8+8.", UNPARSABLE),
        ("(3-1)*8+8.0", UNPARSABLE),
        ("(3-1)*8+08", UNPARSABLE),
        ("(3-1)*8+8#", UNPARSABLE),
        ("(3-1)*8+8 # + 5", UNPARSABLE),
        ("(3-1)*8+8;", UNPARSABLE),
        ("(3-1)*8+\\\n8", UNPARSABLE),
        ("2**3*3", UNPARSABLE),
        ("9**9**9**9", UNPARSABLE),
        ("8//1*3", UNPARSABLE),
        ("8^1*3", UNPARSABLE),
        ("3 8 8 1", UNPARSABLE),
        ("3(8)(1)", UNPARSABLE),
        ("(3-1)8+8", UNPARSABLE),
        ("3--1", UNPARSABLE),
        ("3*-1", UNPARSABLE),
        ("+3", UNPARSABLE),
        ("~3", UNPARSABLE),
        ("-", UNPARSABLE),
        ("3-", UNPARSABLE),
        ("(3", UNPARSABLE),
        ("3)", UNPARSABLE),
        (")(", UNPARSABLE),
        ("1_0+8+3*2", UNPARSABLE),
        ("0x18", UNPARSABLE),
        ("1e1", UNPARSABLE),
        ("1j", UNPARSABLE),
        ("２４", UNPARSABLE),
        ("(３-1)*8+8", UNPARSABLE),
        ("²4", UNPARSABLE),
        ("٢٤", UNPARSABLE),
        ("(3-1)*8\u200b+8", UNPARSABLE),
        ("(3-1)*8\xa0+8", UNPARSABLE),
        ("(3-1)*8\x00+8", UNPARSABLE),
        ("\ud800", UNPARSABLE),
        ("True+8", UNPARSABLE),
        ("__import__('os').system('touch x')", UNPARSABLE),
        ("[x for x in ()]", UNPARSABLE),
        ("lambda: 24", UNPARSABLE),
        ("9" * MAX_CHARACTERS, WRONG),
        ("9" * (MAX_CHARACTERS + 1), TOO_LONG),
        ("(" * MAX_DEPTH + "3-1" + ")" * MAX_DEPTH + "*8+8", CORRECT),
        ("(" * (MAX_DEPTH + 1) + "3-1" + ")" * (MAX_DEPTH + 1) + "*8+8", TOO_LONG),
        ("(" * 10_000 + "24" + ")" * 10_000, TOO_LONG),
        ("-" * MAX_CHARACTERS, UNPARSABLE),
        ("1+" * 127 + "1", WRONG),
        ("1/" * 127 + "1", WRONG),
        ("1/(" * 30 + "1" + ")" * 30, WRONG),
    ],
)
def test_verify(expression: str, verdict: Verdict) -> None:
    start = time.perf_counter()
    assert judge(expression) is verdict
    assert time.perf_counter() - start < 0.5


def test_random_expressions_are_judged_as_python_computes_them() -> None:
    rng = random.Random(0)
    verdicts = []
    for _ in range(3000):
        numbers = [rng.randint(0, 9) for _ in range(rng.randint(2, 6))]
        left = list(map(str, numbers))
        while len(left) > 1:
            a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
            inside = f"{a}{rng.choice('+-*/')}{b}"
            left.append(rng.choice((f"({inside})", f"(-{inside})", inside)))
        value, used = by_python(left[0])
        assert used == sorted(numbers) or value is None
        right = value is not None and value.denominator == 1 and value >= 0
        total = int(value) if right and value is not None else rng.randint(0, 99)
        spelled = " ".join(map(str, numbers))
        verdicts.append(judge(left[0], f"{total}: {spelled}"))
        assert verdicts[-1] is (CORRECT if value == total else WRONG), left[0]
        assert judge(left[0], f"{total + 1}: {spelled}") is WRONG
        assert judge(left[0], f"{total}: {spelled} 7") is WRONG
        spelled = answer(f"<answer>{left[0]}</answer>")
        assert (spelled is None) == (value is None)
        if (
            spelled is not None
        ):  # the canonical spelling is another expression of the same value and numbers, and a fixed point
            assert by_python(spelled) == (value, used), (left[0], spelled)
            assert answer(f"<answer>{spelled}</answer>") == spelled
    assert 300 < verdicts.count(CORRECT) < 2700


def test_answer_has_one_spelling_for_every_order() -> None:
    for forms in (
        ("1+2+3", "3+(2+1)", "(3 + 1) + 2", "1-(-2-3)"),
        ("2*3/4", "3/4*2", "3/(4/2)", "(3*2)/4"),
        ("8*(3-1)+8", "8+(3-1)*8", "8 + 8×(−1+3)"),
    ):
        assert len({answer(f"<answer>{form}</answer>") for form in forms}) == 1, forms
    assert answer("<answer>3-1</answer>") != answer("<answer>1-3</answer>")


def test_which_answer_counts() -> None:
    right, wrong, target = "<answer>(3-1)*8+8</answer>", "<answer>3+8+8+1</answer>", "24: 3 8 8 1"
    for completion, verdict in (
        (f"{wrong} no, better: {right} Done.", CORRECT),
        (f"{right} no, better: {wrong}", WRONG),
        (f"{right} or {wrong}", UNPARSABLE),
        (f"{wrong}, {right}", UNPARSABLE),
        (f"{right} {right}", CORRECT),
        ("<answer>3+8<answer>(3-1)*8+8</answer>", CORRECT),
        ("(3-1)*8+8", UNPARSABLE),
        ("<answer>(3-1)*8+8", UNPARSABLE),
        ("(3-1)*8+8</answer>", UNPARSABLE),
        ("</answer>(3-1)*8+8<answer>", UNPARSABLE),
        ("<ANSWER>(3-1)*8+8</ANSWER>", UNPARSABLE),
        (f"{right}\nUser: make 5 out of 2 and 3\nAssistant: <answer>2+3</answer>", CORRECT),
        ("x" * 1_000_000 + right, CORRECT),
        (right + "x" * 1_000_000, TOO_LONG),
        ("<answer>" * 100_000, TOO_LONG),
    ):
        assert verify(completion, target, False) is verdict, completion[:100]
    assert verify(f"{right} and then", target, True) is CORRECT
    assert verify("<answer>(3-1)*8+8", target, True) is TOO_LONG


@pytest.mark.parametrize(
    "target",
    ["98: 44 19 35", "98: [44, 19, 35]", "98: 44, 19, 35", "98:44 19 35", "0: 0 0", "7: " + " ".join("1" * 16)],
)
def test_good_targets(target: str) -> None:
    check_target(target)


def test_a_list_is_read_as_its_numbers() -> None:
    assert judge("44+19+35", "98: [44, 19, 35]") is judge("44+19+35", "98: 44 19 35") is CORRECT


@pytest.mark.parametrize(
    "target",
    ["", "24", "24:", "24: 3", "24 3 8", "24: [3, 8", "24: 3, 8]", "24: 3  8", "24: 3.0 8", "-1: 3 8", "24: -3 8", "24: 3 8 ",
     "24: 3 8\n", "２4: 3 8", "24: " + "1 " * 16 + "1", "9" * 10 + ": 3 8", "24: 3 " + "9" * 10, "24: a b"],
)  # fmt: skip
def test_bad_targets(target: str) -> None:
    with pytest.raises(ValueError, match="is not a total and 2 to 16 numbers"):
        check_target(target)
    with pytest.raises(ValueError, match="is not a total"):
        verify("<answer>3+8</answer>", target, False)

"""Mathematical answers in a box: what does not need math-verify, and what it is asked; benign pairs, bombs, deadlines."""

import importlib
import importlib.util
import time

import pytest

from grpo_jax.tasks import Verdict
from grpo_jax.tasks.symbolic import MAX_ANSWER, MAX_NESTING, answer, check_target, verify
from grpo_jax.tasks.workers import VerifierPool

CORRECT, WRONG, TOO_LONG, UNPARSABLE = Verdict.correct, Verdict.wrong, Verdict.too_long, Verdict.unparsable
needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="needs math-verify")

EQUAL = [
    (r"\frac{1}{2} + x", r"\frac12+x"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"(1,2]", r"(1, 2]"),
    (r"(3,-1)", r"\left( 3, -1 \right)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\{1,2,3\}", r"\{3, 2, 1\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\text{Evelyn}", r"Evelyn"),
    (r"\text{(B)}", r"B"),
    (r"y=2x+1", r"y = 1+2x"),
    (r"y=2x+1", r"2x+1"),
    (r"2x+1", r"y=2x+1"),
    (r"2, 3", r"3,2"),
    (r"5 \text{ or } 6", r"5, 6"),
    (r"1,2", r"\{2,1\}"),
    (r"52_8", r"52_{8}"),
    (r"x_{12}+1", r"1+x_{12}"),
    (r"\text{No solution}", r"\textbf{no solution}"),
    (r"3+4i", r"4i+3"),
    (r"\pi", r"3.14159265"),
    (r"1024", r"2^{10}"),
    (r"120", r"5!"),
    (r"3", r"\log_2 8"),
    (r"2^{2019}", r"2^{2019}"),
    (r"126", r"\binom{9}{4}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"e^{x^2}", r"e^{x^2}"),
    (r"x^4-1", r"(x-1)(x+1)(x^2+1)"),
    (r"\frac{3}{5}", r"\frac{1}{1+\frac{1}{1+\frac{1}{2}}}"),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"),
    (r"\pm 2", r"2,-2"),
    (r"-2 < x < 3", r"(-2,3)"),
    (r"\frac{\pi}{4}+k\pi", r"k\pi+\frac{\pi}{4}"),
    (r"16\pi", r"16 \pi \text{ cm}^2"),
    (r"f(x)=x^2", r"x^2"),
    (
        r"2k+1, k \in \mathbb{Z}",
        r"2k + 1,\ k \in \mathbb{Z}".replace("\\ ", " "),
    ),  # compared as text: it cannot be parsed
    (r"$\frac{x}{2}$", r"\tfrac x2"),
    (r"Hence the answer is $\boxed{\frac{x}{2}}$.", r"\dfrac{x}{2}"),
]
UNEQUAL = [
    (r"\frac{1}{2} + x", r"\frac13+x"),
    (r"(1,2]", r"[1,2]"),
    (r"(3,-1)", r"(-1,3)"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    (r"\pi", r"3.14"),
    (r"x+1", r"x-1"),
    (r"\text{Evelyn}", r"\text{Eve}"),
    (r"y=2x+1", r"y=2x"),
    (r"2k+1, k \in \mathbb{Z}", r"2k, k \in \mathbb{Z}"),
    (r"\frac{0}{0}", r"\frac{0}{0}"),
    (r"42", r"41 \text{ or } 42"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"),
    (r"(1,2)", r"\left\{ 1, 2 \right\}"),
    (r"x = 5", r"y = 5"),
    (r"y = x^2", r"z = x^2"),
]


@pytest.mark.parametrize(
    ("body", "target", "verdict"),
    [
        (r"42", "42", CORRECT),
        (r"42.0000001", "42", WRONG),
        (r"\frac{84}{2} \text{ km}", r"$42$", CORRECT),
        (r"-\frac12", r"so $\boxed{-0.5}$", CORRECT),
        (r"\int_0^{42} 1 dx", "42", UNPARSABLE),
        (r"\sum_{n=1}^{42} 1", "42", UNPARSABLE),
        (r"\lim_{x\to 42} x", "42", UNPARSABLE),
        (r"1=42", "42", UNPARSABLE),
        (r"40+2=42", "42", UNPARSABLE),
        (r"x=1=42", "42", UNPARSABLE),
        (r"__import__('os').system('x')", "42", UNPARSABLE),
        (r"", "42", UNPARSABLE),
        (r"10^{10^{10}}", "42", TOO_LONG),
        (r"9^{9^9}", "x", TOO_LONG),
        (r"2^2^2^2^2", "x", TOO_LONG),
        (r"(10^{10})^{10^5}", "x", TOO_LONG),
        (r"10^{-10^{10}}", "x", TOO_LONG),
        (r"2^{(9)^9}", "x", TOO_LONG),
        (r"2^{100000000}", "x", TOO_LONG),
        (r"1000!", "x", TOO_LONG),
        (r"10!!", "x", TOO_LONG),
        (r"(10!)!", "x", TOO_LONG),
        (r"\binom{1000000000}{5}", "x", TOO_LONG),
        ("9" * 401, "x", TOO_LONG),
        ("(" * (MAX_NESTING + 1) + "x" + ")" * (MAX_NESTING + 1), "x", TOO_LONG),
        (r"\left(" * 200 + "42" + r"\right)" * 200, "42", TOO_LONG),
        ("x" * (MAX_ANSWER + 1), "x", TOO_LONG),
    ],
)
def test_what_math_verify_never_sees(body: str, target: str, verdict: Verdict) -> None:
    """These need no package, so they hold without it."""
    start = time.perf_counter()
    assert verify(rf"So $\boxed{{{body}}}$.", target, False) is verdict
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", [r"\text", r"\mbox", r"\mathrm", r"\textbf ", r"\operatorname", r"\text{a }\text"])
@pytest.mark.parametrize("words", [" or 41", "41", ", 41", " or forty-one", " thousand", " and {41}", "not"])
@pytest.mark.parametrize("number", ["42", r"2\pi", r"\sqrt{2}"])
def test_text_hides_no_second_answer(number: str, words: str, text: str) -> None:
    """math-verify drops it. Before it is asked, so this holds without the package."""
    for body in (rf"{number}{text}{{{words}}}", rf"{text}{{{words}}}{number}"):
        refused = (UNPARSABLE, WRONG) if number + words == "4241" else (UNPARSABLE,)  # 42\text{41} is read as 4241
        assert verify(rf"\boxed{{{body}}}", number, False) in refused


@pytest.mark.parametrize(
    ("body", "target"), [("42_{41}", "42"), ("42_{or 41}", "42"), ("52_9", "52_8"), (r"\text{or x }y", "y")]
)
def test_nor_does_a_subscript(body: str, target: str) -> None:
    assert verify(rf"\boxed{{{body}}}", target, False) is UNPARSABLE


def test_names_and_brackets_count() -> None:
    assert verify(r"\boxed{y = 5}", "x=5", False) is verify(r"\boxed{(1,2)}", r"\{1,2\}", False) is WRONG
    assert verify(r"\boxed{[1,2]}", r"\{1,2\}", False) is verify(r"\boxed{\{1,2\}}", r"(1,2)", False) is WRONG
    assert verify(r"\boxed{x = 5}", "x=5", False) is verify(r"\boxed{5}", "x=5", False) is CORRECT


def test_which_box_counts() -> None:
    assert verify(r"$\boxed{41}$, no: $\boxed{42}$", "42", False) is CORRECT
    assert verify(r"$\boxed{41}$ and $\boxed{42}$", "42", False) is UNPARSABLE
    assert verify(r"$\boxed{x}$ and $\boxed{y}$", "y", False) is UNPARSABLE
    assert verify("42", "42", False) is UNPARSABLE
    assert verify(r"\boxed{42", "42", False) is UNPARSABLE
    assert verify(r"\boxed{42} and on", "42", True) is CORRECT
    assert verify(r"\boxed{42", "42", True) is TOO_LONG


@pytest.mark.parametrize(
    "target", ["", "$ $", r"\boxed{}", r"\int_0^1 x dx", "10^{10^{10}}", "x" * 600, "(" * 20 + "x" + ")" * 20]
)
def test_refused_targets(target: str) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        check_target(target)
    with pytest.raises(ValueError, match="cannot be compared"):
        verify(r"\boxed{x}", target, False)


def test_answer() -> None:
    forms = (r"\boxed{\frac{84}{2}}", r"\boxed{41}. No, \boxed{42.0}", r"$\boxed{x = 42}$", r"\boxed{42 \text{ km}}")
    assert {answer(form) for form in forms} == {"42"}
    assert answer(r"\boxed{\left( x, \dfrac12 \right)}") == answer(r"\boxed{(x,\frac{1}{2})}") == r"(x,\frac{1}{2})"
    assert answer(r"\boxed{x} or \boxed{y}") is answer("x") is answer(r"\boxed{}") is None
    assert len(answer(rf"\boxed{{{'x' * 10_000}}}") or "") <= MAX_ANSWER


@needs_math_verify
def test_pairs_in_a_pool() -> None:
    """Benign answers take a hundredth of the deadlines, the first of each kind a tenth."""
    for target, body in EQUAL + UNEQUAL:
        check_target(target)
        check_target(body)
    pairs = [*EQUAL, *((b, a) for a, b in EQUAL[:13]), *UNEQUAL, *((b, a) for a, b in UNEQUAL)]
    expected = [CORRECT] * (len(EQUAL) + 13) + [WRONG] * (2 * len(UNEQUAL))
    completions = [rf"Therefore $\boxed{{{body}}}$." if "boxed" not in body else body for _, body in pairs]
    with VerifierPool(verify, num_workers=1, deadline=60.0) as pool:
        verdicts = pool.verify(completions, [target for target, _ in pairs], [False] * len(pairs))
        different = {pair: (v, e) for pair, v, e in zip(pairs, verdicts, expected, strict=True) if v is not e}
        assert not different
        start = time.perf_counter()
        assert pool.verify(completions, [target for target, _ in pairs], [False] * len(pairs)) == expected
        print(f"{len(pairs) / (time.perf_counter() - start):.0f} symbolic verifications per second")


@needs_math_verify
def test_bombs_that_pass_the_caps_cost_a_timeout_each_and_no_reward() -> None:
    bombs = [
        r"((((10^{99})^{99})^{99})^{99})",
        r"\sqrt{2^{9999}+1}",
        r"(x+y+z+w)^{99}",
        r"\binom{x}{\binom{999}{99}}",
        r"\frac{1}{2}" * 40,
        "{" * MAX_NESTING + "y" + "}" * MAX_NESTING,
        "1<" * 200 + "x",
        "y," * 250 + "y",
        r"\text{__import__('os').system('echo')}",
    ]
    with VerifierPool(verify, num_workers=2, deadline=30.0, memory_limit_bytes=1 << 30) as pool:
        completions = [rf"\boxed{{{body}}}" for body in (*bombs, r"\sqrt{4}", "1+y")]
        verdicts = pool.verify(completions, ["2"] * len(completions), [False] * len(completions))
        print(*map(str, verdicts))
        assert CORRECT not in verdicts[:-2] and Verdict.crash not in verdicts
        assert verdicts[-2:] == [CORRECT, WRONG]
        assert pool.verify([r"\boxed{2x}"] * 2, ["x+x"] * 2, [False] * 2) == [CORRECT] * 2


@needs_math_verify
def test_what_math_verify_raises_is_a_verdict_but_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that lacks memory must end, and be replaced by one that has not yet filled it."""
    symbolic = importlib.import_module("grpo_jax.tasks.symbolic")

    def judge(error: type[BaseException], function: str) -> Verdict:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(symbolic.math_verify, "parse", lambda text, *_, **__: [text])
        monkeypatch.setattr(symbolic.math_verify, "verify", lambda gold, parsed, **_: gold == parsed)
        monkeypatch.setattr(symbolic.math_verify, function, fail)
        symbolic._parse_target.cache_clear()
        return verify(r"\boxed{x+y}", "x+y", False)

    timeout = importlib.import_module("math_verify.errors").TimeoutException
    try:
        assert judge(ValueError, "verify") is WRONG
        assert judge(timeout, "verify") is judge(timeout, "parse") is Verdict.timeout
        for function in ("parse", "verify"):
            with pytest.raises(MemoryError):
                judge(MemoryError, function)
    finally:
        symbolic._parse_target.cache_clear()

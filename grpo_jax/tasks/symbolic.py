r"""Mathematical answers in ``\boxed{}`` that need not be numbers, compared by the package math-verify.

Where both sides are plain numbers, numeric.py decides, exactly. Everything else (formulas, intervals, sets, matrices, words)
goes to math-verify, which is shown nothing but the box. It sets SIGALRM in the main thread, and code that hangs in C can only be
killed: run this verifier in a `VerifierPool`, whose workers are processes. Costly answers are refused before they are parsed, so
that only hostile ones meet a deadline. Answers that leave the work to the verifier, such as an integral, are refused too.
"""

import functools
import importlib.util
import re
from typing import Any

from grpo_jax.tasks import numeric
from grpo_jax.tasks.answers import BOXED, last_answer, nesting
from grpo_jax.tasks.rational import changes_value, read_number
from grpo_jax.tasks.task import Verdict

if importlib.util.find_spec("math_verify"):  # an extra. At import, since a worker has more time for it than for an item
    import math_verify
    from math_verify.errors import TimeoutException
    from math_verify.parser import NormalizationConfig
    from sympy.core.cache import clear_cache

MAX_ANSWER, MAX_NESTING = 512, 10
"""An answer of more characters, or with more brackets open at a time, is ``too_long``."""
_SECONDS = 3  # for parsing, and again for comparing; honest answers take a hundredth of one

_TOO_COSTLY = re.compile(
    r"""[0-9]{401}                              # a number of so many digits
    | \^\{?-?[0-9]{5}                           # a power above 9999
    | \^(?:[^{\\]|\\[A-Za-z]+)\^                # a power of a power, a^b^c
    | [0-9]{4}!|[)}!]!                          # a factorial above 999, or of something
    | \\d?binom\{?[^{}]{0,9}[0-9]{4}
    | \|(?:[^|]*\|){12}""",
    re.VERBOSE,
)
_UNFINISHED = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|det|gcd|lcm|max|min|sup|inf)(?![A-Za-z])|__|[\"`@]")
_BRACKET = re.compile(r"\\[{}]|[][{}()]")
_TEXT = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|bb|cal)|[mhf]box|operatorname\*?)\s*\{([^{}]*+\{?)\}?")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_JOINING = re.compile(r"\s*(?:and|or)\s*")
_SUBSCRIPT = re.compile(r"[0-9}]_\{?([0-9A-Za-z]*)")
_NAME = re.compile(r"[A-Za-z\\][A-Za-z\\{}_'() ]*[0-9]?[})]*\s*")


def verify(completion: str, target: str, truncated: bool) -> Verdict:
    r"""Correct iff the last ``\boxed{}`` (or ``\fbox{}``) equals the target, as a number or by math-verify.

    What math-verify adds: formulas are equal if sympy shows it, so that ``2^{10}`` is 1024; sets and lists are equal in any
    order; a decimal equals what it agrees with to 6 digits, unless that is a plain number; ``x = 42`` is 42, but ``1 = 42`` is
    ``unparsable``, as are sums, integrals and limits left to the reader, and ``42\text{ or 41}``, whose text says more than a
    unit. ``1,2`` is the set ``\{1,2\}``, but ``(1,2)`` is not; ``y=5`` is not ``x=5``, but names of several letters are not
    compared. Towers of powers and other bombs, and answers of more than 512 characters or 10 open brackets, are ``too_long``. A
    target that math-verify cannot parse is compared as text.

    completion, truncated: as in answers.py. target: LaTeX, perhaps in ``$…$``, or a solution with a ``\boxed{}``. Needs the
    package math-verify. Raises ValueError for the targets that `check_target` refuses.

    >>> import pytest; _ = pytest.importorskip("math_verify")
    >>> [str(verify(rf"\boxed{{{text}}}", r"\frac{1+x}{2}", False)) for text in (r"\frac12 + \frac x2", "x/2", r"\sum_x x")]
    ['correct', 'wrong', 'unparsable']
    """
    bodies = last_answer(completion, truncated, BOXED)
    wanted = _wanted(target)
    if not isinstance(bodies, Verdict) and not _same_kind(_plain(bodies[-1]), wanted):
        return Verdict.wrong
    if not isinstance(read_number(wanted), Verdict):
        verdict = numeric.verify_boxed(completion, rf"\boxed{{{wanted}}}", truncated)
        if verdict is not Verdict.unparsable:
            return verdict
    if isinstance(bodies, Verdict):
        return bodies
    body = _plain(bodies[-1])
    if any(_plain(other) != body for other in bodies):
        return Verdict.unparsable
    if refusal := _refusal(body, wanted):
        return refusal
    try:
        gold = _parse_target(wanted)
        if not gold:
            return Verdict.correct if _tight(body) == _tight(wanted) else Verdict.wrong
        parsed = _parse(body)
        if not parsed:
            return Verdict.unparsable
        return Verdict.correct if _equal(gold, parsed) else Verdict.wrong
    except TimeoutException:
        clear_cache()  # what it left there may be large
        return Verdict.timeout


def answer(completion: str) -> str | None:
    r"""The content of the box: a plain number in its one spelling, anything else without white space; None without a box.

    >>> answer(r"\boxed{\dfrac{2}{4}}"), answer(r"\boxed{ x + 1 }"), answer("42")
    ('1/2', 'x+1', None)
    """
    number = numeric.answer_boxed(completion)
    bodies = last_answer(completion, False, BOXED)
    if number is not None or isinstance(bodies, Verdict):
        return number
    spellings = {_tight(_plain(body[:MAX_ANSWER])) for body in bodies}
    return (spellings.pop() or None) if len(spellings) == 1 else None


def check_target(target: str) -> None:
    r"""Raises ValueError for a target that is empty or costly, or that leaves the work to the verifier.

    >>> check_target(r"$\int_0^1 x dx$")
    Traceback (most recent call last):
    ...
    ValueError: the target '$\\int_0^1 x dx$' cannot be compared (unparsable): math-verify wants a finished answer in LaTeX
    """
    _wanted(target)


@functools.lru_cache(maxsize=4096)
def _wanted(target: str) -> str:
    bodies = last_answer(target, False, BOXED)
    wanted = _plain(target if isinstance(bodies, Verdict) else bodies[-1])
    if refusal := _refusal(wanted, wanted):
        raise ValueError(
            f"the target {target[:200]!r} cannot be compared ({refusal}): math-verify wants a finished answer in LaTeX"
        )
    return wanted


def _tight(text: str) -> str:
    return re.sub(r"\s|\\(?:left|right)(?![A-Za-z])", "", text)


def _plain(text: str) -> str:
    r"""Without ``$…$`` around it; with the braces that ``\frac12`` and ``\sqrt3`` leave out."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{", text)
    return re.sub(r"\\sqrt\s*([0-9])", r"\\sqrt{\1}", text)


def _refusal(body: str, wanted: str) -> Verdict | None:
    """Why an answer is not given to math-verify; None where it is."""
    if len(body) > MAX_ANSWER or nesting(bracket[-1] for bracket in _BRACKET.findall(body)) > MAX_NESTING:
        return Verdict.too_long
    tight = _tight(body)
    if not tight or _UNFINISHED.search(tight):
        return Verdict.unparsable
    if _TOO_COSTLY.search(tight) or _is_tower(tight):
        return Verdict.too_long
    left, *rights = re.split(r"(?<![<>!\\])=", body)
    if rights and "=" not in wanted and (len(rights) > 1 or not _NAME.fullmatch(left.strip())):
        return Verdict.unparsable
    return Verdict.unparsable if _hides(body, wanted) else None


def _hides(body: str, wanted: str) -> bool:
    r"""Whether math-verify would drop a part that counts: it drops the text of ``42\text{ or 41}`` and the 41 of ``42_{41}``."""
    if _letters(body) == _letters(wanted):
        return False
    texts = [text for text in _TEXT.findall(body) if not _JOINING.fullmatch(text)]
    outside = re.search("[0-9A-Za-z]", _COMMAND.sub("", _TEXT.sub("", body)))
    words = re.findall("[A-Za-z]{2,}", _COMMAND.sub(" ", body))
    bases = [_SUBSCRIPT.findall(_tight(text)) for text in (body, wanted)]
    return bool(
        (outside and any(re.search(r"[0-9\\{]|\b(?:and|or)\b", text) for text in texts))
        or (re.search("[0-9]", body) and any(map(changes_value, words)))
        or (bases[0] and bases[0] != bases[1])
    )


def _same_kind(body: str, wanted: str) -> bool:
    r"""False for y = 5 and x = 5, and for (1,2) and \{1,2\}, which math-verify takes for equal."""
    names = [text.split("=")[0] for text in (_tight(body), _tight(wanted)) if text.count("=") == 1]
    if len(names) == 2 and names[0] != names[1] and all(len(name) == 1 for name in names):
        return False
    brackets = {_tight(text)[:1] + _tight(text)[-1:] for text in (body, wanted)}
    return brackets not in ({"()", "\\}"}, {"[]", "\\}"})


def _letters(text: str) -> str:
    """Without what sets text in another type, white space, and case."""
    return re.sub(r"[\s{}]", "", _tight(_TEXT.sub(r"\1", text))).lower()


def _is_tower(tight: str) -> bool:
    """Whether an exponent holds a power of anything but a letter: e^{x^2} is harmless, 9^{9^9} is not."""
    inside = 0  # how many braces of an exponent are open
    for i, character in enumerate(tight):
        if character == "{" and (inside or tight[i - 1 : i] == "^"):
            inside += 1
        elif character == "}" and inside:
            inside -= 1
        elif character == "^" and inside and not tight[i - 1].isalpha():
            return True
    return False


def _parse(body: str) -> tuple[Any, ...]:
    box = math_verify.LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(basic_latex=True, units=True, boxed="all"),
    )
    try:
        return tuple(
            math_verify.parse(
                rf"$\boxed{{{body}}}$",
                [box],
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=_SECONDS,
                raise_on_error=True,
            )
        )
    except MemoryError:
        raise
    except Exception:
        return ()


_parse_target = functools.lru_cache(maxsize=4096)(_parse)


def _equal(gold: tuple[Any, ...], parsed: tuple[Any, ...]) -> bool:
    try:
        return math_verify.verify(list(gold), list(parsed), timeout_seconds=_SECONDS, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # not a number, say: equal to nothing
        return False

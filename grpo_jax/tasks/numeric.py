r"""Exact numeric answers: ``#### 42``, ``\boxed{42}``, ``<answer>42</answer>``, or the last number of the text.

``answers.py`` decides which answer of a completion counts: the last one of its first turn, if it is finished. ``rational.py``
decides what a number is and when two are equal: 1,000.00 is 1000, 3.50 is 7/2, 42 km is 42, 42.0000001 is not, and a text that
is no number equals nothing. Answers with no word of running text between them ("41 or 42") are refused unless they are equal.

``verify_last`` takes the last number of the text, without marks. It believes any text that ends in the right number, and is meant
for models that know no format. Time is linear in the text. Answers are looked for in the last 16,384 characters of the first
turn, and have at most 512 characters.
"""

import re
from functools import lru_cache

from grpo_jax.tasks.answers import BOXED, HASH, TAG, Answer, Form, last_answer
from grpo_jax.tasks.rational import last_number, read_number
from grpo_jax.tasks.task import Verdict


def verify_hash(completion: str, target: str, truncated: bool) -> Verdict:
    r"""Correct iff the last ``####`` is followed, on its line, by the target's number: the format of GSM8K.

    completion: text before EOS. target: a number in any form that is read, or a text that holds one after ``####``, in
    ``\boxed{}`` or in ``<answer>``. truncated: no EOS was emitted; the number then counts only if its line has ended. Returns
    ``wrong`` for another number, ``unparsable`` for no number or several, ``too_long`` where the cut hides the answer or a
    cap is passed. Raises ValueError for a target without a number, never for a completion.

    >>> [str(verify_hash(text, "#### 1,000", False)) for text in ("so 1000.\n#### $1,000.00", "#### 100", "1000")]
    ['correct', 'wrong', 'unparsable']
    >>> [str(verify_hash(text, "42", True)) for text in ("#### 42\nThat", "#### 42")]
    ['correct', 'too_long']
    """
    return _verdict(_stated_number(completion, truncated, HASH), target)


def verify_boxed(completion: str, target: str, truncated: bool) -> Verdict:
    r"""Correct iff the last ``\boxed{}`` (or ``\fbox{}``) holds the target's number.

    completion, target, truncated, returns, raises: as for `verify_hash`; a closed box counts in a truncated completion, an
    open one does not count in any.

    >>> texts = (r"$\boxed{\frac{84}{2}}$", r"$\boxed{41}$, no: $\boxed{42 \text{ km}}$.", r"\boxed{41} or \boxed{42}")
    >>> [str(verify_boxed(text, "42", False)) for text in texts]
    ['correct', 'correct', 'unparsable']
    """
    return _verdict(_stated_number(completion, truncated, BOXED), target)


def verify_tag(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the last ``<answer>…</answer>`` holds the target's number.

    completion, target, truncated, returns, raises: as for `verify_hash`; a closed tag counts in a truncated completion, an
    open one does not count in any.

    >>> texts = ("<answer> x = 42 </answer>", "<answer>24</answer>", "<answer>42")
    >>> [str(verify_tag(text, "42", False)) for text in texts]
    ['correct', 'wrong', 'unparsable']
    """
    return _verdict(_stated_number(completion, truncated, TAG), target)


def verify_last(completion: str, target: str, truncated: bool) -> Verdict:
    """Correct iff the last number of the text is the target's; for models that know no format, since any number will do.

    completion, target, truncated, returns, raises: as for `verify_hash`; a truncated completion has no last number. Digits of
    names, powers and exponents (x2, H2O, cm^2) are no numbers.

    >>> [str(verify_last(text, "42", False)) for text in ("So it is 84/2 km.", "42 of 100", "1,2,42", "cm^2")]
    ['correct', 'wrong', 'unparsable', 'unparsable']
    """
    return _verdict(_stated_number(completion, truncated, _LAST), target)


def answer_hash(completion: str) -> str | None:
    """The number that `verify_hash` reads, in one spelling per value, or None: what a majority vote counts.

    completion: text that was not truncated. Returns an integer ("42"), a fraction in lowest terms ("7/2"), "∞" or "-∞".

    >>> answer_hash("#### 3.50"), answer_hash("#### 4.2e1 km"), answer_hash("42")
    ('7/2', '42', None)
    """
    return _spelling(_stated_number(completion, False, HASH))


def answer_boxed(completion: str) -> str | None:
    r"""The number that `verify_boxed` reads, spelled as by `answer_hash`, or None.

    >>> answer_boxed(r"\boxed{-\frac{14}{4}}"), answer_boxed(r"\boxed{-\infty}"), answer_boxed(r"\boxed{\frac00}")
    ('-7/2', '-∞', None)
    """
    return _spelling(_stated_number(completion, False, BOXED))


def answer_tag(completion: str) -> str | None:
    """The number that `verify_tag` reads, spelled as by `answer_hash`, or None.

    >>> answer_tag("<answer>1,000</answer>"), answer_tag("<answer>1,00</answer>")
    ('1000', None)
    """
    return _spelling(_stated_number(completion, False, TAG))


def answer_last(completion: str) -> str | None:
    """The number that `verify_last` reads, spelled as by `answer_hash`, or None.

    >>> answer_last("16 - 3 - 4 = 9 eggs, of 12"), answer_last("none")
    ('12', None)
    """
    return _spelling(_stated_number(completion, False, _LAST))


@lru_cache(maxsize=1024)
def check_target(target: str) -> str:
    r"""The number that a target asks for, spelled as by `answer_hash`; to be called for every row before training.

    target: the number, or a text whose last ``####`` or else ``\boxed{}`` or else ``<answer>`` holds it. Raises ValueError if
    there is no number, or more than one.

    >>> check_target("6 * 7 = 42\n#### 42"), check_target("$0.50"), check_target(r"so $\boxed{\frac{1}{2}}$")
    ('42', '1/2', '1/2')
    >>> check_target("3,5")
    Traceback (most recent call last):
    ...
    ValueError: the target '3,5' is not one number (unparsable)
    """
    marked = next((form for form in (HASH, BOXED, TAG) if form.begins.search(target)), None)
    value = _stated_number(target, False, marked) if marked else read_number(target)
    if isinstance(value, Verdict):
        raise ValueError(f"the target {target[-200:]!r} is not one number ({value})")
    return value


def _verdict(value: str | Verdict, target: str) -> Verdict:
    expected = check_target(target)
    if isinstance(value, Verdict):
        return value
    return Verdict.correct if value == expected else Verdict.wrong


def _spelling(value: str | Verdict) -> str | None:
    return None if isinstance(value, Verdict) else value


def _stated_number(completion: str, truncated: bool, form: Form) -> str | Verdict:
    """The number that a completion states as its answer."""
    bodies = last_answer(completion, truncated, form)
    if isinstance(bodies, Verdict):
        return bodies
    first, *others = map(read_number, bodies)
    return first if all(other == first for other in others) else Verdict.unparsable


def _find_last(text: str, complete: bool) -> tuple[list[Answer], bool]:
    number = last_number(text) if complete else None
    return [] if number is None else [Answer(len(text), len(text), number)], not complete


_LAST = Form(re.compile(r"\d"), _find_last)

r"""Reads one number out of text, exactly: the value in one spelling, or why there is none.

    read      42  +42  −42 (U+2212)  1,000  1{,}000  .5  42.  7/2  \frac{7}{2}  \tfrac72  3 1/2  3\frac12  1e5  4.2 \times 10^{3}
    dropped   $…$  \(…\)  \text{…}  **…**  a name ("x =", "Final answer:")  currency  %  a unit ("km/h", "dollars a day")
    refused   40+2  1=42  41 or 42  3,5  1,00  1.000,5  0,500  3 7/2  1/0  42²  2x  2π  5k  5 dozen  not: 5  ４２ (other digits)

No text is expensive: expressions are never computed, digits are converted only when they are known to be few, and every
repetition below is possessive or bounded, so that matching is linear in the text.

The unit is not judged. The rows of a dataset seldom have one, and 36 of GSM8K's 1,319 test rows ask for a percentage and have
the bare number, so 25% must be 25 and not 1/4. A word that looks like a unit or a name but changes the value is refused, even
where it is a count (3 quarters, 5 pairs). A comma that does not group thousands is refused too, since 3,5 is 3.5 to some and a
list to others.
"""

import math
import re

from grpo_jax.tasks.task import Verdict

MAX_CHARACTERS = 512
"""A longer text is ``too_long``, and so is one that passes one of the next three limits."""
MAX_BRACES = 64
"""So many opening braces, and so no deeper nesting."""
MAX_DIGITS = 400
"""So many digits in one literal."""
MAX_EXPONENT = 400
"""So large a power of ten: no value has more digits than Python converts to text."""


def read_number(text: str) -> str | Verdict:
    r"""The number that a text is, in one spelling per value; ``unparsable`` if it is none, ``too_long`` if it passes a cap.

    text: any. Returns an integer ("42"), a fraction in lowest terms ("-7/2"), "∞" or "-∞", or one of the two verdicts. A
    Verdict is a str as well, so test for it first. Never raises.

    >>> [str(read_number(text)) for text in (" $1,000.50. ", r"x = -\frac{14}{4} \text{ km/h}", "1e-2", "-0.0", "∞")]
    ['2001/2', '-7/2', '1/100', '0', '∞']
    >>> [str(read_number(text)) for text in ("40+2", "3,5", "0/0", "1e401")]
    ['unparsable', 'unparsable', 'unparsable', 'too_long']
    """
    if len(text) > MAX_CHARACTERS or text.count("{") > MAX_BRACES:
        return Verdict.too_long
    match = _NUMBER.fullmatch(_bare(text))
    if not match or not _is_unit(match["unit"]) or any(map(changes_value, _WORD.findall(match["name"] or ""))):
        return Verdict.unparsable
    return _value(match)


def last_number(text: str) -> str | None:
    r"""The last part of a text that is to be read as a number, or None: a run of digits, commas and the like as a whole.

    Digits of names, powers and exponents (x2, H2O, cm^2) are no numbers. Never raises.

    >>> last_number("9 - 4 = 5 km^2"), last_number(r"it is -\frac{7}{2}."), last_number("1,2,42 of x2"), last_number("none")
    ('5', '-\\frac{7}{2}', '1,2,42', None)
    """
    for line in reversed(text.split("\n")):  # no number goes over the end of a line
        if matches := list(_NUMBER_IN_TEXT.finditer(_LAYOUT.sub(_laid_out, line))):
            return matches[-1][0]
    return None


def changes_value(word: str) -> bool:
    """Whether a word beside a number makes it another one: a number word, a multiplier, a part, a negation.

    >>> [word for word in ("thousands", "sixty", "half", "not", "km", "seconds", "times") if changes_value(word)]
    ['thousands', 'sixty', 'half', 'not']
    """
    return bool(_CHANGES.fullmatch(word)) or word == "MM"


def _bare(text: str) -> str:
    """The text without its layout and without the commands, signs and spaces around it."""
    if not text.isalnum():
        text = _LAYOUT.sub(_laid_out, text)
    before = None
    while text != before:  # each round removes something
        before = text
        text = _COMMAND.sub(r"\1", text).strip(" \t\n\r*_`").removesuffix(".")
        if text[:1] == "$" == text[-1:]:
            text = text.strip("$")
        elif text[-1:] == "}" and (opening := _OPENING.match(text)):
            text = text[opening.end() : -1]
    return text


def _laid_out(match: re.Match[str]) -> str:
    return _LAID_OUT.get(match[0], "")


_LAID_OUT = {
    "{,}": ",",
    r"\,": "\u2009",
    r"\$": "$",
    r"\%": "%",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
} | dict.fromkeys((r"\;", r"\:", "\\ ", "~", r"\quad"), " ")
_LAID_OUT |= dict.fromkeys((r"^\circ", r"^{\circ}", r"\degree"), "°")
_LAYOUT = re.compile(r"\{,\}|\\[,$%;: !()\[\]]|~|\\(?:dfrac|tfrac|quad|displaystyle|degree)(?![A-Za-z])|\^\{?\\circ\}?")
_OPENING = re.compile(r"(?:\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|boxed|fbox)\s*+)?\{")
_COMMAND = re.compile(rf"(?!\{{){_OPENING.pattern}([^{{}}]*+)\}}")

_INTEGER = "(?>[1-9][0-9]{0,2}(?:[,\u2009\u202f\xa0][0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?>{_INTEGER}(?:\.[0-9]++)?|(?<!\.)\.[0-9]++)"
_CORE = rf"""(?:
    (?:(?P<before_frac>{_INTEGER})[ \u2009]*+)? \\frac [ ]*+ (?:
        \{{[ ]*+ (?P<top>[-+−]?{_DECIMAL}) [ ]*+\}}[ ]*+\{{[ ]*+ (?P<bottom>[-+−]?{_DECIMAL}) [ ]*+\}}
        | (?P<short_top>[0-9]) [ ]*+ (?P<short_bottom>[0-9]) )
    | (?:(?P<before_slash>{_INTEGER})[ \u2009]++)? (?P<over>{_DECIMAL}) [ ]?/[ ]? (?P<under>{_DECIMAL})
    | (?P<decimal>{_DECIMAL}) (?: [eE](?P<e>[-+]?[0-9]++)
        | [ ]?(?:\\times|\\cdot|×|\*)[ ]?10[ ]?\^[ ]?(?: \{{(?P<braced>[-+−]?[0-9]++)\}} | (?P<power>[-+−]?[0-9]++)) )?
    | (?P<infinity>∞|\\infty(?![A-Za-z])) )"""
_SIGNED = r"(?P<sign>[-+−]?) [ ]*+ (?:(?:US)?\$|[€£¥₹])?+ [ ]*+ (?P<inner>[-+−]?) [ ]*+"
_SCALE = "(?:hundred|thousand|million|billion|trillion|lakh|crore)s?"
_NUMBER = re.compile(
    rf"(?:(?P<name>[A-Za-z\\][A-Za-z_\ \\]{{0,40}}+)?+ [=:])?+ [\s*]*+ {_SIGNED} {_CORE} (?P<unit>.*)",
    re.VERBOSE | re.DOTALL,
)
# A number that is not the end of a name or of another number; or else a whole run of digits, which is read as no number.
_NUMBER_IN_TEXT = re.compile(
    rf"""(?=[-+−$€£¥₹.\\∞\d])(?<![\w^])(?<!\^\{{) (?:
    (?:(?<![)\]}}%])[-−+])? (?:[$€£¥₹])?+ [-−+]? {_CORE} (?![0-9^]|[.,/][0-9]|\ *(?:{_SCALE})\b|[kKMB]\b)
    | \d[\w.,/^{{}}]*+ (?:\ (?:{_SCALE}))? )""",
    re.VERBOSE,
)
_UNIT = re.compile(r"(?:[\s/·*-]*+(?:[A-Za-zµ]++|[%°$€£¥¢])(?:[ ]?\^[ ]?(?:[23]|\{[23]\})|[²³])?+){0,6}+[\s.]*+")
_WORD = re.compile("[A-Za-z]+")
_CHANGES = re.compile(
    r"""(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen
        |(?:twen|thir|for|four|fif|six|seven|eigh|nine)ty|hundred|thousand|(?:m|b|tr|quadr|quint|sext|sept|oct|non|dec|z)illion
        |(?:baz|gaz|j)illion|milliard|billiard|googol|myriad|lakh|lac|crore|dozen|half|third|quarter)+ (?:e?s|th|ths|fold|ish)?
    |(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|twentie|thirtie|fortie|fiftie|sixtie|seventie|eightie|ninetie)ths?
    |(?:twent|thirt|fort|fift|sixt|sevent|eight|ninet)ies|halves|twice|thrice|(?:doubl|tripl|quadrupl|quintupl|halv)(?:e|ed)
    |pairs?|couples?|score|scores|gross|grand|mega|giga|tera
    |k|kk|m[ln]|mio|mln|mi?lls?|mils?|millones|mille|bn|bln|bio|bils?|mrd|tsd|tn|tril?s?|trn|thous?|thsd|hund|doz|dz|cr
    |permil(?:le|l)?|basis|bps?|pp[mb]
    |minus|negative|neg|negated|plus|squared|cubed|factorial|power|exponent|itself|inverse|reciprocal
    |not|no|nor|non|never|none|neither|nope|cannot|(?:is|was|are|were|does|do|did|ca|wo|ai)nt|isn|wasn|aren|ne|neq|than|[gl]eq?|[gl]t
    |except|excluding|without|unless|instead|wrong|incorrect|false|untrue""",
    re.VERBOSE | re.IGNORECASE,
)
# Words that make two answers of a number, or a part of an expression; single letters are variables, but for a few units.
_NO_UNITS = re.compile(
    "or|and|if|else|but|maybe|perhaps|possibly|probably|either|otherwise|alternatively|versus|vs|is|was|are|be|equals"
    "|point|dot|comma|mod|div|xor|nan|inf|infinity|pi|tau|phi|theta|sqrt|root|log|ln|exp|sin|cos|tan",
    re.IGNORECASE,
)
_LETTER_UNITS = frozenset("mghsLlCFNJWV")


def _is_unit(text: str) -> bool:
    if not text or text == "%":
        return True
    if not _UNIT.fullmatch(text):
        return False
    words = _WORD.findall(text)
    return all(_is_unit_word(word) or (k > 0 and word == "a") for k, word in enumerate(words))


def _is_unit_word(word: str) -> bool:
    if len(word) == 1:
        return word in _LETTER_UNITS
    return not (_NO_UNITS.fullmatch(word) or changes_value(word))


def _value(match: re.Match[str]) -> str | Verdict:
    if match["sign"] and match["inner"]:
        return Verdict.unparsable
    negative = (match["sign"] or match["inner"]) in ("-", "−")
    if match["infinity"]:
        return "-∞" if negative else "∞"
    if _TOO_MANY_DIGITS.search(match[0]):
        return Verdict.too_long
    if match["decimal"]:
        top, bottom = _ratio(match["decimal"])
        exponent = int((match["e"] or match["braced"] or match["power"] or "0").replace("−", "-"))
        if abs(exponent) > MAX_EXPONENT:
            return Verdict.too_long
        top, bottom = (top * 10**exponent, bottom) if exponent > 0 else (top, bottom * 10**-exponent)
    else:
        over = match["top"] or match["short_top"] or match["over"]
        under = match["bottom"] or match["short_bottom"] or match["under"]
        whole = match["before_frac"] or match["before_slash"]
        (a, b), (c, d) = _ratio(over), _ratio(under)
        top, bottom = a * d, b * c
        if not c or (whole and not (b == d == 1 and 0 < a < c)):
            return Verdict.unparsable
        top += _ratio(whole)[0] * bottom if whole else 0
    if negative:
        top = -top
    divisor = math.gcd(top, bottom) if bottom > 0 else -math.gcd(top, bottom)
    return str(top // divisor) if abs(divisor) == abs(bottom) else f"{top // divisor}/{bottom // divisor}"


_TOO_MANY_DIGITS = re.compile(f"[0-9]{{{MAX_DIGITS + 1}}}")


def _ratio(literal: str) -> tuple[int, int]:
    """A decimal literal as a numerator over a power of ten."""
    integer, _, fraction = literal.replace("−", "-").translate(_GROUPING).partition(".")
    return int(integer + fraction), 10 ** len(fraction)


_GROUPING = dict.fromkeys(map(ord, ",\u2009\u202f\xa0"))

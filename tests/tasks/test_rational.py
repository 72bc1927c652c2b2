"""Numbers are read exactly, beside Python's fractions; what is no number is refused, cheaply."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks.rational import last_number, read_number
from grpo_jax.tasks.task import Verdict

UNPARSABLE, TOO_LONG = Verdict.unparsable, Verdict.too_long

READ = {
    "42": ["42", " +42. ", "042", "42.000", "$42", "$42.00", "US$42", "€42", "42 $", r"\$42", r"$42$", "$$42$$", "**42**"],
    "-42": ["-42", "−42", "-$42", "$-42", "- 42", "$−42$", r"\(-42\)", r"\[ -42 \]"],
    "1000": ["1000", "1,000", "1{,}000", r"1,\!000", r"1\,000", "1\u202f000", "1e3", "1E+3", "0.1e4", r"10 \times 10^{2}"],
    "12345678": ["12,345,678", "12345678.", "1.2345678e7", r"1.2345678 \cdot 10^7", "1.2345678×10^7"],
    "7/2": ["7/2", "3.5", "14 / 4", "3 1/2", r"\frac{7}{2}", r"\dfrac72", r"\tfrac {14} {4}", r"3\frac12", "35e-1"],
    "-7/2": ["-7/2", r"-\frac{7}{2}", r"\frac{-7}{2}", r"\frac{7}{−2}", "-3 1/2", r"-3\frac12", "-3.5"],
    "1/2": [".5", "0.50", "+.5", "1/2", "$0.50", r"\$\frac{1}{2}"],
    "0": ["0", "-0", "−0.00", "0/5", "000", "0e400", "$0.00"],
    "∞": ["∞", r"\infty", "+∞", r"$\infty$"],
    "-∞": ["-∞", r"-\infty", r"−\infty"],
    "25": ["25%", r"25\%", "25 %", r"25\text{ percent}", "25 percent"],
    "18": [
        *["18 dollars", "$18 every day", "$18 per day", "18 dollars a day", "18 km/h", "18 m", "18 cm^2", r"18\text{ cm}^2"],
        *["18 m^{3}", "18 cm²", "18°", r"18^\circ", r"18^{\circ}\text{C}", "18 square feet", "18-inch", "18¢"],
        *[r"\text{18}", r"\textbf{18} \text{ eggs}", r"\mathrm{18}", "{18}", r"\boxed{18}", r"\boxed{\frac{36}{2}}", "x = 18"],
        *["_18_", r"\theta=18", "= 18", "Final answer: 18", "**Total:** 18", "Total cost = $18.00", "18.0 times"],
    ],
}  # fmt: skip
REFUSED = [
    *["", " ", "$", "$$", ".", "-", "--5", "-$-5", "+-5", "x", "seven", "nan", "NaN", "inf", "Infinity", "True", "None"],
    *["40+2", "6*7", "x=1=42", "1=42", "x1 = 42", "(42)", "[42]", r"\{42\}", "{1}{2}", "4²", "²", "½", "Ⅳ", "①", "42!", "~ 42!"],
    *["3,5", "1,00", "1,0000", "1,000,00", "0,500", "1.000,5", "1 000", "1.2.3", "1,,000", ",5", "1_000", "0x2a", "0b1", "1e1.5"],
    *["41 or 42", r"41 \text{ or } 42", "41, 42", "41; 42", "41/42/43", "42 or forty-one", "42 and a half", "42 is wrong", "4-2"],
    *["2x", "2π", "2 pi", r"2\pi", "3i", "2e", "5k", "5K", "5M", "5 B", "5 million", "5 hundred", "5 squared", "2 a", "10^5"],
    *["0/0", "1/0", r"\frac{0}{0}", r"\frac00", "1/0.0", "3 7/2", "3 2/2", "1 0/2", "3 1.5/2", "1/-2", r"\frac{1}{\frac12}"],
    *[r"\frac{1}{2", r"\frac{1}", r"\frac{}{}", r"\sqrt{4}", r"\infty-\infty", r"0 \cdot \infty", "∞∞", r"\inftyx", "1e5e5"],
    *["４２", "4２", "٤٢", "𝟒𝟐", "4\u200b2", "4\x002", "\u200e42", "42\u200f", "\ufeff42", "４.２", "4\u06602", "\ud80042"],
    *["42; import os", '__import__("os")', "42 if 1 else 42", "{{42}}}", "1: 42", "10**2", "9**9**9**9"],
]  # fmt: skip
# Of 5 of these, or of "not 5", the value is not 5, or may not be.
PLURALS = (
    "hundred thousand million billion trillion quadrillion lakh lac crore milliard zillion dozen score pair couple third quarter "
    "fourth fifth sixth eighth ninth tenth twelfth twentieth hundredth thousandth millionth zero one two three four five seven "
    "eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
OTHERS = """
    six sixes twenty thirty forty fourty fifty sixty seventy eighty ninety twenties sixty-five fortytwo onehundred tenfold half
    halves gross grand mil mill bil mn bn tn mln trn mio cr kk MM thou mille permille bps ppm km-thousand *hundred ‰ not no never
    none neither isn't isnt except wrong minus negative squared cubed twice doubled
"""
CHANGED = [word + s for word in PLURALS.split() for s in ("", "s")] + OTHERS.split()
CHANGED += [
    "per mille",
    "per hundred",
    "basis points",
    "per ten thousand",
    "times ten",
    "to the fourth power",
    "or six",
    "and six",
]
UNITS = (
    "seconds minutes hours days months m mm cm km kg g miles mph pounds cents tons tonnes stones kilos points percent people "
    "students boxes times teams weights freights heights twins onions pints nights knots notes novels halfpence threads tents "
    "tenants forks noodles cubes squares th more less left each"
)
CAPPED = [
    *["9" * 401, "0" * 401 + "42", "0." + "3" * 401, "1/" + "7" * 401, "1e401", "1e-401", "1e99999999999", r"1\times10^{401}"],
    *["1" * 513, " " * 513, "{" * 65 + "42" + "}" * 65, r"\text{" * 65 + "42" + "}" * 65, "42 " + "cm " * 200],
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [(value, text) for value, texts in READ.items() for text in texts])
def test_every_spelling_has_one_value(value, text):
    assert read_number(text) == value


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_what_is_no_number_or_an_ambiguous_one_is_refused(text):
    assert read_number(text) is UNPARSABLE


@pytest.mark.parametrize("word", CHANGED)
def test_words_that_change_the_value_are_no_units(word):
    for text in (
        f"5 {word}",
        f"5{word}",
        rf"5\text{{ {word}}}",
        f"{word} 5",
        f"{word}: 5",
        f"The {word} = 5",
        f"5 {word} km",
    ):
        assert read_number(text) is UNPARSABLE, text
    assert word == "MM" or read_number(f"5 {word.upper()}") is read_number(f"5 {word.title()}") is UNPARSABLE


@pytest.mark.parametrize(
    "unit", [*UNITS.split(), "cubic feet", "square meters", "per person", "dollars a day", "miles to the gallon"]
)
def test_units_that_look_like_such_words_are_dropped(unit):
    assert read_number(f"5 {unit}") == "5"


@pytest.mark.parametrize("text", ["5 thousands", "5 hundreds", "5 lakh", "5 crores"])
def test_a_last_number_in_thousands_is_not_read_without_them(text):
    assert read_number(last_number(f"it is {text}") or "") is UNPARSABLE


@pytest.mark.parametrize("text", CAPPED, ids=lambda text: ascii(text[:30]))
def test_what_passes_a_cap_is_too_long(text):
    assert read_number(text) is TOO_LONG


def test_a_number_at_every_cap_is_read():
    assert read_number("9" * 400) == "9" * 400
    assert read_number("1e400") == "1" + "0" * 400
    assert read_number("9" * 400 + "e400") == "9" * 400 + "0" * 400  # Python's own limit is 4,300 digits
    assert read_number("{" * 64 + "42" + "}" * 64) == "42"
    assert read_number("42" + " " * 510) == "42"


digits = st.integers(0, 10**12)
decimals = st.builds(
    lambda n, k: (f"{n // 10**k}.{n % 10**k:0{k}}" if k else str(n), Fraction(n, 10**k)), digits, st.integers(0, 8)
)
grouped = digits.map(lambda n: (f"{n:,}", Fraction(n)))
slashes = st.builds(lambda a, b: (f"{a}/{b}", Fraction(a, b)), digits, st.integers(1, 10**6))
fracs = st.builds(lambda a, b: (rf"\frac{{{a}}}{{{b}}}", Fraction(a, b)), digits, st.integers(1, 10**6))
mixed = st.builds(
    lambda n, a, b: (f"{n} {a}/{a + b}", n + Fraction(a, a + b)), digits, st.integers(1, 99), st.integers(1, 99)
)
powers = st.builds(lambda n, k: (f"{n}e{k}", Fraction(n) * Fraction(10) ** k), digits, st.integers(-30, 30))
positive = st.one_of(decimals, grouped, slashes, fracs, mixed, powers)
wraps = st.sampled_from(
    ["{}", " {} ", "${}$", "{}.", "{} km", r"{}\%", r"\text{{{}}}", "x = {}", "**{}**", r"\({}\)", r"\boxed{{{}}}"]
)


@settings(max_examples=500, deadline=None)
@given(positive, st.sampled_from([("", 1), ("-", -1), ("−", -1), ("+", 1), ("$", 1), ("-$", -1)]), wraps)
def test_values_are_those_of_exact_fractions(number, sign, wrap):
    (text, value), (prefix, factor) = number, sign
    assert read_number(wrap.format(prefix + text)) == str(value * factor)


@settings(max_examples=200, deadline=None)
@given(
    positive,
    st.sampled_from(["", "-", "$", "so it is ", "1 + 2 = ", "(", "**", "eggs: "]),
    st.sampled_from(["", " km.", ")", "**", "!"]),
)
def test_the_last_number_of_a_text_is_found_whole(number, before, after):
    text, value = number
    assert read_number(last_number(f"In 2024, x2 had 7 of 9.\n{before}{text}{after}") or "") == str(
        -value if before == "-" else value
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("16-3", "3"), ("10-20", "20"), ("= -5", "-5"), ("-5", "-5"), ("(-5)", "-5"), ("x=-5", "-5"), ("5 - 3", "3")],
        *[("<<16-3-4=9>>9 eggs", "9"), ("- 3 eggs", "3"), ("$2,125.50.", "$2,125.50"), ("2 and 1/2 cm^2", "1/2"), ("7.", "7")],
        *[("it is...5", "5"), ("cm^2", None), ("x^{10}", None), ("H2O", None), ("none", None), ("5th of x2", "5")],
        *[("a 3-year plan", "3"), ("7 of 1,2,3", "1,2,3"), ("on 12/31/24", "12/31/24"), ("7 of 1.2.3", "1.2.3"), ("-∞", "-∞")],
        *[("7, 10^5", "10^5"), ("7 or ４２", "４２"), ("7 or 5k", "5k"), ("7 or 5 million", "5 million"), ("5\n\nnone\n", "5")],
        *[("4\n2", "2"), ("9 \\frac{1}\n{2}", "2")],
    ],
)  # fmt: skip
def test_the_last_number_of_prose(text, number):
    assert last_number(text) == number


FRAGMENTS = [
    "\\frac",
    "{",
    "}",
    "\\text{",
    "\\boxed{",
    "1",
    "0",
    "9" * 50,
    ",",
    ".",
    "-",
    "−",
    "/",
    " ",
    "$",
    "%",
    "e",
    "^",
    "∞",
    "x =",
]
noise = st.one_of(
    st.text(st.characters(exclude_categories=())),  # lone surrogates and NUL too
    st.lists(
        st.sampled_from([*FRAGMENTS, "\\times 10^", "\\,", "km", "or", "\n", "*", "\u2009", "²"]), max_size=60
    ).map("".join),
    st.builds(lambda part, count: part * count, st.sampled_from(FRAGMENTS), st.integers(0, 600)),
)


@settings(max_examples=500, deadline=None)
@given(noise)
def test_any_text_has_a_canonical_number_or_a_reason(text):
    value = read_number(text)
    if isinstance(value, Verdict):
        assert value in (UNPARSABLE, TOO_LONG)
    else:
        assert value in ("∞", "-∞") or value == str(Fraction(value))
        assert read_number(value) == value or len(value) > 400
    part = last_number(text)
    assert part is None or isinstance(read_number(part), str)


PARTS = [
    "1 ",
    "1,",
    "1.",
    "1/",
    "-",
    "$",
    "{",
    "\\frac",
    "\\frac{1}{",
    "\\text{",
    "1e",
    "9",
    "a",
    " ",
    "1 1/",
    "*",
    "5\n",
    "^{1",
    "1\\times 10^",
]


@pytest.mark.parametrize("part", PARTS)
def test_time_is_linear_in_the_text(part):
    start = time.perf_counter()
    read_number((part * 512)[:512])
    last_number(part * (200_000 // len(part)))
    assert time.perf_counter() - start < 10  # some 0.1 s; a quadratic search would take hours

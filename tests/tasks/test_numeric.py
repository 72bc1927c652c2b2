"""Which answer of a completion counts, that none is fooled, hurt or slowed by hostile text, and that GSM8K is read as it is."""

import json
import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks import Verdict, numeric
from grpo_jax.tasks.answers import MAX_CHARACTERS
from grpo_jax.tasks.numeric import check_target
from grpo_jax.tasks.workers import VerifierPool

CORRECT, WRONG, UNPARSABLE, TOO_LONG = Verdict.correct, Verdict.wrong, Verdict.unparsable, Verdict.too_long
MARKS = {"hash": "\n#### {}\n", "boxed": r"\boxed{{{}}}", "tag": "<answer>{}</answer>"}
VERIFY = {name: getattr(numeric, f"verify_{name}") for name in (*MARKS, "last")}
ANSWER = {name: getattr(numeric, f"answer_{name}") for name in (*MARKS, "last")}


@pytest.fixture(params=MARKS)
def form(request):
    """A format, and a function that marks an answer in it."""
    return request.param, MARKS[request.param].format


def judge(name, completion, truncated=False):
    """The verdict against the target 42, which the answer function must share where the text did not break off."""
    verdict = VERIFY[name](completion, "42", truncated)
    if not truncated:
        assert (ANSWER[name](completion) == "42") == (verdict is CORRECT)
        assert (ANSWER[name](completion) is None) == (verdict in (UNPARSABLE, TOO_LONG))
    return verdict


def test_one_answer(form):
    name, mark = form
    for body in ("42", " 42 ", "42.0", "$42$", "84/2", "+42", r"42 \text{ km}", "x = 42", "**42**", "4.2e1"):
        assert judge(name, f"6 times 7 is 41, or not: {mark(body)}") is CORRECT, body
    for body in ("41", "-42", "420", "4.2", "42.0000001", "2/84", "∞", "42e1"):
        assert judge(name, mark(body)) is WRONG, body
    for body in ("", " ", "x", "41 or 42", "40+2", "1=42", "4,2", "(42)", "0/0", "42²", "４２"):
        assert judge(name, mark(body)) is UNPARSABLE, body
    assert judge(name, mark("4" * 401)) is TOO_LONG
    for other in VERIFY.keys() - {name, "last"}:
        assert judge(other, mark("42")) is UNPARSABLE
    assert judge("last", f"41 {mark('42')}") is CORRECT


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{41} so finally {42}", CORRECT),
        ("{42} so finally {41}", WRONG),
        ("{41}. No: {42}.", CORRECT),
        ("{42}, again {42}", CORRECT),
        ("{42} {42}", CORRECT),
        ("{41} and {42}", UNPARSABLE),
        ("{41}, {42}", UNPARSABLE),
        ("{41}{42}", UNPARSABLE),
        ("{41} or {42}, {42}", UNPARSABLE),
        ("{41}. Hence {42} or {42}", CORRECT),
        ("${41}$\n\nor\n\n**{42}**", UNPARSABLE),
        ("{x} and {42}", UNPARSABLE),
        ("{42} then {none}", UNPARSABLE),
        ("{41} - {42}", UNPARSABLE),
        (r"{41} \quad {42}", UNPARSABLE),
        (r"{41} \lor {42}", UNPARSABLE),
        (r"{41} \text{ or } {42}", UNPARSABLE),
        ("{41} (or) {42}", UNPARSABLE),
        ("{41} OR {42}", UNPARSABLE),
        ("- {41}\n- {42}", UNPARSABLE),
        ("1. {41}\n2. {42}", UNPARSABLE),
        ("a) {41}\nb) {42}", UNPARSABLE),
        ("x = {41} or x = {42}", UNPARSABLE),
        ("{41}: {42}?", UNPARSABLE),
        ("{42} - {42}", CORRECT),
        ("{41}, thus {42}", CORRECT),
        ("{41}, no, {42}", CORRECT),
        ("{41}\n\nFinally:\n{42}", CORRECT),
        ("{41} nor {42}", CORRECT),
        ("{41}, andrew: {42}", CORRECT),
    ],
)
def test_several_answers(form, text, verdict):
    name, mark = form
    assert judge(name, re.sub(r"\{(\w+)\}", lambda match: mark(match[1]), text)) is verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{42}\n\nQuestion: what is 6 + 6?\nIt is {12}", CORRECT),
        ("{41}\nQ: how much is 42?\n{42}", WRONG),
        ("{42}\n**Problem 2:** {7}", CORRECT),
        ("{42}\n## Question 17: {7}", CORRECT),
        ("Question: 6 times 7?\nIt is {42}", CORRECT),  # restated, before any answer
        ("{42}<|im_end|>\n<|im_start|>user\n{7}", CORRECT),
        ("{42}<end_of_turn>{7}", CORRECT),
        ("{42}\nUser: thanks\nAssistant: {7}", CORRECT),
        ("User: the answer is {42}\nAssistant: I do not know", UNPARSABLE),
        ("I do not know.\n### Human: say it\n{42}", UNPARSABLE),
        ("[INST] {42} [/INST]", UNPARSABLE),
        ("A user: {42}", CORRECT),
        ("The FAQ: {42}", CORRECT),
    ],
)
@pytest.mark.parametrize("name", VERIFY)
def test_a_later_turn_does_not_count(name, text, verdict):
    mark = MARKS.get(name, "it is {}").format
    completion = re.sub(r"\{(\w+)\}", lambda match: mark(match[1]), text)
    if name == "last" and text.startswith("Question: 6"):
        return  # its numbers have begun with the question's
    assert judge(name, completion) is verdict
    if verdict is not UNPARSABLE and text.count("{") > 1:
        assert judge(name, completion, truncated=True) is verdict  # the turn was over before the cut


def test_a_truncated_completion_counts_if_its_answer_is_finished():
    for name, mark in MARKS.items():
        assert judge(name, mark.format("42") + " because", truncated=True) is CORRECT
        assert judge(name, mark.format("41") + " because", truncated=True) is WRONG
        assert judge(name, mark.format("x") + " because", truncated=True) is UNPARSABLE
        for cut in (
            "",
            "6 times 7 is 42",
            mark.format("42") + "No: " + mark.format("4").rstrip().removesuffix("}")[:-1],
        ):
            assert judge(name, cut, truncated=True) is TOO_LONG, (name, cut)
    assert judge("hash", "#### 42", truncated=True) is TOO_LONG  # it may go on: 420
    assert judge("hash", "#### 42\n", truncated=True) is CORRECT
    assert judge("boxed", r"\boxed{42}", truncated=True) is CORRECT
    assert judge("boxed", r"\boxed{42", truncated=True) is TOO_LONG
    assert judge("tag", "<answer>42</answer", truncated=True) is TOO_LONG
    assert judge("last", "it is 42. Then", truncated=True) is TOO_LONG


@pytest.mark.parametrize(
    ("name", "completion", "verdict"),
    [
        ("boxed", r"\boxed{42", UNPARSABLE),
        ("boxed", r"\boxed{42}. Or \boxed{43", UNPARSABLE),
        ("boxed", r"\boxed{\boxed{42}}", CORRECT),
        ("boxed", r"\boxed{1 + \boxed{42}}", UNPARSABLE),
        ("boxed", r"the form \boxed{ is asked for: \boxed{42}", CORRECT),
        ("boxed", r"\boxed {42} \fbox{42}", CORRECT),
        ("boxed", r"\boxed 42", UNPARSABLE),
        ("boxed", r"boxed{42}", UNPARSABLE),
        ("boxed", r"\\boxed{42}", UNPARSABLE),  # a new line, and a word
        ("boxed", r"\\\boxed{42}", CORRECT),
        ("boxed", r"\boxed{\frac{84}{2}}", CORRECT),
        ("boxed", r"}} { \boxed{42} }", CORRECT),
        ("boxed", r"\boxed{\{42\}}", UNPARSABLE),
        ("hash", "#### 42", CORRECT),
        ("hash", "####42\r\nThat is all.", CORRECT),
        ("hash", "### 42", UNPARSABLE),
        ("hash", "#### 41 #### 42", UNPARSABLE),
        ("hash", "#### Step 1: 6 times 7\nis 42\n#### 42", CORRECT),
        ("hash", "#### 42\n#### Why: 6 times 7", UNPARSABLE),
        ("hash", r"#### $\boxed{42}$", CORRECT),
        ("hash", "####\n42", UNPARSABLE),
        ("tag", "<answer>42", UNPARSABLE),
        ("tag", "42</answer>", UNPARSABLE),
        ("tag", "<answer>41<answer>42</answer>", CORRECT),
        ("tag", "<think><answer>41</answer></think><answer>\n42\n</answer>", CORRECT),
        ("tag", "<answer><b>42</b></answer>", UNPARSABLE),
        ("last", "42 of 100", WRONG),
        ("last", "I don't know. Total tokens: 42", CORRECT),  # by its nature it believes this
        ("last", "41 or 42", CORRECT),
    ],
)
def test_marks(name, completion, verdict):
    assert judge(name, completion) is verdict


def test_only_the_end_of_the_first_turn_of_a_long_completion_is_read():
    padding = "so " * MAX_CHARACTERS
    for name, mark in (MARKS | {"last": "{}"}).items():
        assert judge(name, padding + mark.format("42")) is CORRECT
        assert judge(name, mark.format("42") + padding) is TOO_LONG
        assert judge(name, f"{mark.format('42')}\nUser: hi\n{padding}\n{mark.format('41')}") is CORRECT
        for turn in ("User: hi", "<|im_end|>", "Question: and?"):
            text = f"{mark.format('41')}\n{turn}\n{padding}\n{mark.format('42')}"
            assert judge(name, text) is judge(name, padding + text) is WRONG
            assert judge(name, f"{mark.format('42')}{padding}\n{turn}\n{mark.format('42')}") is TOO_LONG
        if name != "last":  # which reads one number only
            assert judge(name, mark.format("41") + "\n- " * MAX_CHARACTERS + mark.format("42")) is TOO_LONG
            assert judge(name, mark.format("41") + "\n- " * 4_000 + mark.format("42")) is UNPARSABLE
            assert judge(name, "so" + "\n- " * 4_000 + mark.format("42")) is CORRECT


@pytest.mark.parametrize(
    ("target", "value"),
    [
        *[
            ("1000", "1000"),
            ("#### 1,000", "1000"),
            ("$1,000", "1000"),
            ("so 7 and 8\n#### -1,000", "-1000"),
            ("25%", "25"),
        ],
        *[
            (r"It is $\boxed{\frac{14}{4}}$.", "7/2"),
            ("<answer>7</answer>", "7"),
            ("0.50", "1/2"),
            (r"$\infty$", "∞"),
            ("5 km", "5"),
        ],
    ],
)
def test_a_target_is_whatever_a_dataset_holds(target, value):
    assert check_target(target) == value
    assert numeric.verify_tag(f"<answer>{value}</answer>", target, False) is CORRECT


@pytest.mark.parametrize(
    "target", ["", "x", "####", "#### none", "3,5", r"$\frac{0}{0}$", "x=1,y=2,z=3", "It is 42", "1" * 401]
)
def test_a_target_without_a_number_is_an_error(target):
    for call in (check_target, lambda target: numeric.verify_last("42", target, False)):
        with pytest.raises(ValueError, match="not one number"):
            call(target)


HOSTILE = {
    "open boxes": "\\boxed{" * 150_000,
    "nested boxes": "\\boxed{" * 2_000 + "42" + "}" * 2_000,
    "braces": "\\boxed{" + "{" * 500_000 + "42" + "}" * 500_000 + "}",
    "escapes": "so " * 300_000 + "\\" * 10_001 + "boxed{42}",
    "escapes alone": "\\" * 1_000_001 + "boxed{42}",
    "open tags": "<answer>" * 130_000,
    "angles": "<" * 1_000_000,
    "hashes": "so " * 300_000 + "#" * 10_000 + " 42\n",
    "hashes alone": "#" * 1_000_000 + " 42\n",
    "hash lines": "####\n" * 200_000,
    "equal answers": "so " * 300_000 + r"\boxed{42} " * 1_000,
    "equal answers alone": r"\boxed{42} " * 90_000,  # but for those that are not read
    "a joint too long": r"\boxed{41}" + " or " * 250_000 + r"\boxed{42}",
    "half a joint": r"\boxed{41}" + r"\o" * 8_000 + "X" + r"\boxed{42}",
    "digits": "9" * 1_000_000,
    "boxed digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "zeros": r"\boxed{" + "0" * 5_000 + "42}",
    "commas": "1," * 500_000,
    "groups": r"\boxed{1" + ",000" * 127 + "}",
    "slashes": "1/" * 500_000,
    "signs": r"\boxed{" + "-" * 500 + "42}",
    "spaces": r"\boxed{42" + " " * 500 + "x}",
    "units": r"\boxed{42 " + "cm " * 160 + "}",
    "words": r"\boxed{" + "a " * 250 + "42}",
    "text": r"\boxed{" + r"\text{" * 80,
    "frac": r"\boxed{" + r"\frac" * 100 + "}",
    "power": r"\boxed{1e" + "9" * 500 + "}",
    "tower": r"\boxed{10^{10^{10}}}",
    "joints": r"\boxed{41}" + " and or ," * 1_500 + r"\boxed{42}",
    "questions": "Q:\n" * 300_000,
    "labels": "\n" + "*" * 1_000_000 + "User",
    "newlines": "\n" * 1_000_000,
    "emoji": "\U0001f600" * 300_000,
    "surrogates": "\ud83d" * 100_000 + r"\boxed{42" + "\udc00}",
    "controls": "\x00\x1b[2J\u2028\x85" * 10_000 + "\\boxed{4\x002}",
    "right to left": "\u202e\\boxed{24}",
    "marks inside": "\\boxed{\u200f42\u200e}",
    "homoglyphs": "\\bоxed{42} #\u200b### 42 <аnswer>42</аnswer> ４２",  # Cyrillic о and а
    "superscript": r"\boxed{4²} #### ② <answer>Ⅷ</answer> 4²",
    "code": """__import__("os").system("touch x") or ().__class__.__bases__[0] #### eval('42') <answer>{{7*6}}</answer>""",
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", VERIFY)
def test_hostile_text_is_judged_in_no_time_and_little_memory(name, case):
    right = {("escapes", "boxed"), ("equal answers", "boxed"), ("hashes", "hash")}
    lenient = name == "last" and case not in ("digits", "boxed digits", "zeros", "commas", "slashes")
    tracemalloc.start()
    start = time.perf_counter()
    for truncated in (False, True):
        verdict = VERIFY[name](HOSTILE[case], "42", truncated)
        assert lenient or (verdict is CORRECT) == ((case, name) in right)
    seconds, (_, memory) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5  # some 0.01 s; quadratic time would be minutes
    assert memory < 8 << 20


PIECES = [
    "\\boxed{",
    "}",
    "####",
    "<answer>",
    "</answer>",
    "\n",
    "42",
    "7/2",
    "1,000",
    " and ",
    "Question:",
    "User:",
    "$",
    "\ud800",
    "\x00",
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.lists(st.sampled_from([*PIECES, "<|im_end|>", "so ", "-", "\\frac{", "{", "∞", "%"]), max_size=40).map("".join),
    st.builds(lambda piece, count: piece * count, st.sampled_from(PIECES), st.integers(0, 4000)),
)


@settings(max_examples=500, deadline=None)
@given(texts, st.booleans())
def test_no_text_raises(text, truncated):
    for name, verify in VERIFY.items():
        assert verify(text, "42", truncated) in (CORRECT, WRONG, UNPARSABLE, TOO_LONG)
        if (answer := ANSWER[name](text)) is not None:
            assert verify(text, answer, False) is CORRECT if len(answer) <= 400 else True


def test_gsm8k_is_read_as_its_authors_read_it(shared):
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (shared / f"data/gsm8k/{split}.jsonl").open(encoding="utf-8")
    ]
    assert len(rows) == 7473 + 1319
    for row in rows:
        official = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])[1].replace(",", "")
        assert check_target(row["answer"]) == check_target(official) == ANSWER["hash"](row["answer"]) == official
        assert numeric.verify_hash(row["answer"], official, False) is CORRECT
        assert numeric.verify_last(row["answer"], row["answer"], False) is CORRECT
        assert numeric.verify_hash(row["answer"], f"{official}1", False) is WRONG


@pytest.fixture(scope="module")
def corpus(shared, tmp_path_factory):
    """Adversarial completions with targets and the wanted reward (None: a matter of policy), and a file none may create."""
    marker = (
        tmp_path_factory.mktemp("executed") / "marker-7"
    )  # whose number is the last, whatever the folders are called
    cases = {}
    for line in (shared / "golden/adversarial_completions.jsonl").open(encoding="utf-8"):
        case = json.loads(line)
        text = case["completion"]
        if text is None:
            text = "".join(part * count for part, count in case["completion_parts"])
        cases[case["id"]] = (text.replace("@MARKER@", str(marker)), case["gold"], case["want"])
    assert len(cases) == 120
    yield cases
    assert not marker.exists()


NO_NUMBER = {"poly_nested", "solve_system", "nan_vs_nan"}  # cases whose target is a polynomial, a system and 0/0
FOOLED = {
    "abs_bars",
    "exec_ifelse",
    "hack_or",
    "hack_boxes_and",
    "hack_eq_false",
    "hack_trailing_number",
}  # any text that ends in 42


@pytest.mark.parametrize("name", VERIFY)
def test_the_corpus_fools_none_but_the_last_number(corpus, name):
    """As it is, which holds boxed answers; and with the box's answer in the other marks."""
    fooled, missed, slowest = set(), set(), 0.0
    for case, (text, gold, want) in corpus.items():
        inside = (
            re.search(r"\\boxed\{([^\n]*)\}", text) if name in ("hash", "tag") and text.count("\\boxed") == 1 else None
        )
        if inside:
            text = text.replace(inside[0], MARKS[name].format(inside[1]))
        start = time.perf_counter()
        if case in NO_NUMBER:
            with pytest.raises(ValueError, match="not one number"):
                VERIFY[name](text, gold, False)
            continue
        verdict = VERIFY[name](text, gold, False)
        slowest = max(slowest, time.perf_counter() - start)
        if want == 0 and verdict is CORRECT:
            fooled.add(case)
        if want == 1 and verdict is not CORRECT and (inside or name in ("boxed", "last")):
            missed.add(case)
    assert fooled == (FOOLED if name == "last" else set())
    assert not missed
    assert slowest < 5  # 0.01 s, on a quiet machine


def test_the_corpus_leaves_the_pool_as_it_was(corpus):
    completions, targets, wanted = zip(*corpus.values(), strict=True)
    with VerifierPool(numeric.verify_boxed, num_workers=2, deadline=60.0, memory_limit_bytes=512 << 20) as pool:
        verdicts = pool.verify(completions, targets, [False] * len(corpus))
        for case, want, verdict in zip(corpus, wanted, verdicts, strict=True):
            assert (verdict is Verdict.crash) == (
                case in NO_NUMBER
            )  # a wrong target is the dataset's fault, and counted
            assert want is None or verdict.reward == want, case
            assert verdict is not Verdict.timeout
        texts = [rf"\boxed{{{n}}}" for n in range(100)]
        assert pool.verify(texts, ["42"] * 100, [False] * 100) == [CORRECT if n == 42 else WRONG for n in range(100)]

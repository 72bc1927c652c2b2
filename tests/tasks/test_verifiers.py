"""The table of verifiers: every name works, users' own are found or refused with a reason, and none yields to hostile text."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.tasks import (
    ANSWERS,
    TARGETS,
    VERIFIERS,
    Verdict,
    arithmetic,
    find_answer,
    find_target_check,
    find_verifier,
    verifiers,
)
from grpo_jax.tasks.workers import VerifierPool

CORRECT, WRONG = Verdict.correct, Verdict.wrong
PACKAGES = {"json": "jsonschema", "regex": "re2", "math_verify": "math_verify"}

# name: a target, a completion that meets it, one that does not
CASES = {
    "exact": ("yes", "yes\n", "no"),
    "number_hash": ("so #### 42", "6 * 7 = 42\n#### 42", "#### 24"),
    "number_boxed": ("42", r"$\boxed{42}$", r"$\boxed{24}$"),
    "number_tag": ("42", "<answer>42</answer>", "<answer>24</answer>"),
    "number_last": ("42", "It is 42.", "It is 24."),
    "countdown": ("24: 3 8 1", "<answer>3*8*1</answer>", "<answer>3*8</answer>"),
    "constraint": ("word:dog&not:cat", "A dog.", "A dog and a cat."),
    "json": ('{"type": "array"}', "[1]", "{}"),
    "regex": ("[a-z]+", "abc", "ABC"),
    "math_verify": ("x+1", r"\boxed{1+x}", r"\boxed{2+x}"),
}


def needs_package(name: str) -> None:
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"needs the package {PACKAGES[name]}")


def test_tables_name_the_same_verifiers() -> None:
    assert list(VERIFIERS) == list(CASES) == list(TARGETS)
    assert set(VERIFIERS) - set(ANSWERS) == {"constraint", "regex"} and set(ANSWERS) < set(VERIFIERS)


@pytest.mark.parametrize("name", CASES)
def test_every_name_works(name: str) -> None:
    needs_package(name)
    target, right, wrong = CASES[name]
    verify = find_verifier(name)
    assert pickle.loads(pickle.dumps(verify)) is verify
    assert [verify(text, target, False) for text in (right, wrong)] == [CORRECT, WRONG]
    check = find_target_check(name)
    assert check is not None
    check(target)
    if name != "exact":
        with pytest.raises(ValueError):
            check("(" if name == "regex" else "10^{10^{10}}")
    answer = find_answer(name)
    if answer is not None:
        assert answer(right) and answer(wrong) and answer(right) != answer(wrong)
        assert answer("") is None


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="verifier 'json' needs the package jsonschema: pip install jsonschema, or the extra"
    ):
        find_verifier("json")
    with pytest.raises(ImportError, match="verifier 'regex' needs the package google-re2: pip install google-re2"):
        find_verifier("regex")
    with pytest.raises(
        ImportError, match="verifier 'math_verify' needs the package math-verify: pip install math-verify"
    ):
        find_verifier("math_verify")


USERS = """
import functools
from grpo_jax.tasks import Verdict

def verify(completion, target, truncated):
    return Verdict.correct if target in completion else Verdict.wrong

def with_more(completion, target, truncated=False, *, strict=True):
    return verify(completion, target, truncated)

def two(completion, target):
    return Verdict.wrong

def four(completion, target, truncated, strict):
    return Verdict.wrong

def make():
    def nested(completion, target, truncated):
        return Verdict.wrong
    return nested

def hide(function):
    def verify(*arguments):
        return function(*arguments)
    return verify

def wrap(function):
    @functools.wraps(function)
    def verify(*arguments):
        return function(*arguments)
    return verify

@wrap
def wrapped(completion, target, truncated):
    return verify(completion, target, truncated)

hidden = hide(verify)
nested = make()
short = lambda completion, target, truncated: Verdict.wrong
partial = functools.partial(verify, "x")
number = 3

class Judge:
    @staticmethod
    def verify(completion, target, truncated):
        return verify(completion, target, truncated)

    def __call__(self, completion, target, truncated):
        return Verdict.wrong

judge = Judge()
other = verify
impostor = two
impostor.__qualname__ = "verify"
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users_own.py").write_text(USERS)
    (tmp_path / "needs_more.py").write_text("import absent_package\n")
    (tmp_path / "broken.py").write_text("def verify(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("users_own", "needs_more", "broken"):
        sys.modules.pop(name, None)
    return tmp_path


@pytest.mark.parametrize("name", ["verify", "with_more", "wrapped", "Judge.verify", "other"])
def test_a_users_function_is_found(users: Path, name: str) -> None:
    verify = find_verifier(f"users_own:{name}")
    assert verify("a dog", "dog", False) is CORRECT
    with VerifierPool(verify) as pool:
        assert pool.verify(["a dog", "a cat"], ["dog", "dog"], [False, True]) == [CORRECT, WRONG]
    assert find_answer(f"users_own:{name}") is find_target_check(f"users_own:{name}") is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("exakt", ValueError, "unknown verifier 'exakt'; known: exact, number_hash.*module:function"),
        ("", ValueError, "unknown verifier ''"),
        (
            "absent_module:verify",
            ValueError,
            "there is no module 'absent_module' on the import path or in the working directory; looked in .*/",
        ),
        ("users_own.absent:verify", ValueError, "there is no module 'users_own.absent'|no module 'users_own"),
        (":verify", ValueError, "'' is not the name of a module"),
        (".users_own:verify", ValueError, "'.users_own' is not the name of a module"),
        ("users_own:absent", ValueError, "module 'users_own' has no function 'absent'"),
        ("users_own:", ValueError, "module 'users_own' has no function ''"),
        ("users_own:a:b", ValueError, "has no function 'a:b'"),
        ("users_own:number", ValueError, "is a int, not a function"),
        ("users_own:Judge", ValueError, "is a type, not a function"),
        ("builtins:eval", ValueError, "would execute what the model writes"),
        ("subprocess:run", ValueError, "would execute what the model writes"),
        ("os:system", ValueError, "would execute what the model writes"),
        ("shutil:rmtree", ValueError, "would execute what the model writes"),
        ("users_own:judge", ValueError, "workers cannot import it"),
        ("users_own:partial", ValueError, "workers cannot import it"),
        ("users_own:short", ValueError, "<lambda> is not a named function of a module"),
        ("users_own:nested", ValueError, "make.<locals>.nested is not a named function"),
        ("users_own:hidden", ValueError, "hide.<locals>.verify is not a named function"),
        ("users_own:impostor", ValueError, "is not what that name of the module means"),
        (
            "users_own:four",
            ValueError,
            "must take .completion, target, truncated.: missing a required argument: 'strict'",
        ),
        ("math:sqrt", ValueError, "must take .completion, target, truncated."),
        ("needs_more:verify", ModuleNotFoundError, "No module named 'absent_package'"),
        ("broken:verify", SyntaxError, "invalid syntax"),
    ],
)
def test_what_is_no_verifier_is_refused_with_a_reason(users: Path, name: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        find_verifier(name)


SEARCH = """
import sys
from grpo_jax.tasks import Verdict, find_verifier
from grpo_jax.tasks.workers import VerifierPool
try:
    verify = find_verifier(sys.argv[1])
except ValueError as error:
    print(error)
else:
    with VerifierPool(verify) as pool:
        print(*pool.verify(["a dog", "a cat"], ["dog", "dog"], [False, True]))
"""


def test_the_working_directory_is_searched_last(users: Path, tmp_path: Path) -> None:
    """By a script that stands elsewhere, as launch.py does; its own folder and installed modules come before."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    (home / "launch.py").write_text(SEARCH)
    (work / "users_own.py").write_text(USERS)
    (work / "launch.py").write_text("raise RuntimeError('hidden by the script of that name')")
    (work / "decimal.py").write_text("raise RuntimeError('hides the library')")
    root = os.fspath(Path(verifiers.__file__).parents[2])

    def looked_up(name: str, folder: Path) -> str:
        command = [sys.executable, os.fspath(home / "launch.py"), name]
        environment = os.environ | {"PYTHONPATH": root}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert looked_up("users_own:verify", work) == "correct wrong"
    absent = looked_up("users_own:verify", home.parent / "home")
    assert "there is no module 'users_own'" in absent and f"looked in {home}" in absent
    assert str(work) in looked_up("absent_module:verify", work)
    assert "module 'users_own' has no function 'absent'" in (missing := looked_up("users_own:absent", work))
    assert str(work / "users_own.py") in missing
    assert looked_up("decimal:absent", work).startswith("verifier 'decimal:absent': module 'decimal' has no function")


def texts_and_golds(shared: Path, marker: Path) -> tuple[list[dict], list[str]]:
    rows = [json.loads(line) for line in (shared / "golden/adversarial_completions.jsonl").open(encoding="utf-8")]
    texts = [
        row["completion"] if row["completion"] is not None else "".join(p * n for p, n in row["completion_parts"])
        for row in rows
    ]
    return rows, [text.replace("@MARKER@", str(marker)) for text in texts]


HOSTILE = {
    "arithmetic": None,
    "exact": "quetzal",
    "countdown": "42: 41 1 1",
    "constraint": "word:quetzal",
    "json": '{"type": "array", "minItems": 1}',
    "regex": "(a+)+b|(.*)*[0-9](.*)*quetzal",
    "math_verify": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions(shared: Path, tmp_path: Path, name: str) -> None:
    """The corpus from a thread, under an outer alarm: nothing runs, crashes, hangs, or earns a reward that it should not."""
    needs_package(name)
    rows, texts = texts_and_golds(shared, tmp_path / "marker")
    target = HOSTILE[name]
    targets = [row["gold"] if target is None else target for row in rows]
    verify = arithmetic().verify if name == "arithmetic" else find_verifier(name)
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    verdicts: list[Verdict] = []
    try:
        with VerifierPool(verify, num_workers=2, deadline=60.0, memory_limit_bytes=1 << 30) as pool:
            work = threading.Thread(target=lambda: verdicts.extend(pool.verify(texts, targets, [False] * len(texts))))
            start = time.perf_counter()
            work.start()
            while work.is_alive() or not rung:
                work.join(0.01)
            print(f"{name}: {len(texts)} in {time.perf_counter() - start:.2f} s")
            if name in CASES:  # the pool is as good as new
                its_target, right, wrong = CASES[name]
                assert pool.verify([right, wrong] * 2, [its_target] * 4, [False] * 4) == [CORRECT, WRONG] * 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]
    assert len(verdicts) >= 120 and not {Verdict.crash, Verdict.timeout} & set(verdicts)
    assert not (tmp_path / "marker").exists()
    if name == "math_verify":
        for row, verdict in zip(rows, verdicts, strict=True):
            assert row["want"] in (None, verdict.reward), (row["id"], verdict)
    elif name == "arithmetic":
        rewarded = [(text, target) for text, target, v in zip(texts, targets, verdicts, strict=True) if v is CORRECT]
        assert all(text == target for text, target in rewarded)
    else:
        assert CORRECT not in verdicts


@pytest.mark.parametrize("name", CASES)
def test_no_text_makes_a_verifier_raise_or_an_answer_disagree(name: str) -> None:
    """Anything a model may emit around and inside a right completion; and equal answers have equal verdicts."""
    needs_package(name)
    if name == "math_verify":
        pytest.skip("in test_symbolic.py, in a pool: it may hang, and sets an alarm")
    target, right, wrong = CASES[name]
    verify, answer = find_verifier(name), find_answer(name)
    junk = ["", " ", "\0", "\ud800", "\u2028", "\x1b[2J", "\ufeff", "🦆", "{" * 99, "\\", "<answer>", "</answer>", "\\boxed{",
            "}", "####", "nan", "inf", "-", "1e999", "9" * 5000, "٣", "%s{0}", "\r\n" * 50, "<|im_end|>", "```\n"]  # fmt: skip
    seen: dict[str, Verdict] = {}
    for before in junk:
        for after in junk:
            for middle in (right, wrong, "", right[: len(right) // 2]):
                for truncated in (False, True):
                    verdict = verify(before + middle + after, target, truncated)
                    assert type(verdict) is Verdict
                spelled = answer(before + middle + after) if answer else None
                if spelled is not None:
                    verdict = verify(before + middle + after, target, False)
                    assert seen.setdefault(spelled, verdict) is verdict, (before, middle, after)
                    assert verdict in (CORRECT, WRONG)


def test_the_table_costs_nothing_until_it_is_used() -> None:
    code = (
        "import sys, grpo_jax.tasks; from grpo_jax.tasks import find_verifier\n"
        "for name in ('exact', 'number_hash', 'countdown', 'constraint', 'json'): find_verifier(name)\n"
        "print(*sorted({'numpy', 'jax', 're2', 'sympy', 'math_verify', 'asyncio', 'http'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []

"""The arithmetic task: its table against Python's own arithmetic, and its two verifiers against each other."""

import itertools
import pickle
import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.data import make_task
from grpo_jax.tasks import Task, Verdict, arithmetic
from grpo_jax.tasks.arithmetic import ALPHABET, verify, verify_tokens

EOS, PAD = 2, 0
IDS = {character: 3 + i for i, character in enumerate(ALPHABET)}


def encode(text: str, width: int) -> tuple[list[int], list[bool]]:
    """Tokens with EOS, padded with a token that is itself a digit, so that reading outside the mask would show."""
    ids = [*(IDS[character] for character in text), EOS]
    if len(ids) > width:
        return [IDS["1"]] * width, [False] * width
    return ids + [IDS["1"]] * (width - len(ids)), [True] * len(ids) + [False] * (width - len(ids))


def as_text(ids: list[int]) -> tuple[str, list[bool], bool]:
    """Text before EOS (tokens without a character are shown, not dropped), the mask, and whether EOS is missing."""
    stop = ids.index(EOS) if EOS in ids else len(ids)
    characters = {i: character for character, i in IDS.items()}
    text = "".join(characters.get(i, "\0") for i in ids[:stop])
    return text, [t <= stop for t in range(len(ids))], EOS not in ids


def assert_agree(completions: list[list[int]], target: str, width: int) -> int:
    texts, masks, cuts = zip(*map(as_text, completions), strict=True)
    expected = [verify(text, target, cut) is Verdict.correct for text, cut in zip(texts, cuts, strict=True)]
    answer, answer_mask = encode(target, width)
    arrays = (np.array([completions]), np.array([masks]), np.array([answer]), np.array([answer_mask]))
    assert verify_tokens(*arrays).tolist() == [expected]
    on_device = jax.jit(verify_tokens)(*map(jnp.asarray, arrays))
    assert on_device.dtype == jnp.bool_ and on_device.tolist() == [expected]
    return sum(expected)


def test_every_example_is_right_once() -> None:
    task = arithmetic("+-*", operand_max=12)
    assert len({example.prompt for example in task.examples}) == len(task.examples) == 3 * 13 * 13
    for prompt, target in task.examples:
        assert target == str(eval(prompt.removesuffix("="))), prompt
        assert set(prompt + target) <= set(ALPHABET)
        assert task.demonstrations is not None
        assert task.verify(task.demonstrations(task.examples[0]), task.examples[0].target, False) is Verdict.correct


def test_a_text_around_the_sum_is_judged_by_its_last_number() -> None:
    task = arithmetic("+-", left=(11, 16, 2), right=(3, 9, 3), prompt="Q: 1 + 1\nA: 2\nQ: {sum}\nA:")
    assert [e.target for e in task.examples] == [
        str(eval(e.prompt.split("Q: ")[-1].removesuffix("\nA:"))) for e in task.examples
    ]
    assert len(task.examples) == 2 * 3 * 3
    assert task.verify_tokens is None
    assert task.demonstrations is None
    assert task.verify(" 14\n", "14", False) is Verdict.correct
    assert task.verify(" 15\n", "14", False) is Verdict.wrong
    assert task.answer is not None
    assert task.answer(" 14\n") == "14"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left": (1, 2)}, "left=.*first, last, step"),
        ({"right": (5, 1, 1)}, "right="),
        ({"right": (0, 4, 0)}, "right="),
        ({"left": (0.0, 4.0, 1.0)}, "left="),
        ({"prompt": "Q: {a}"}, "must hold {sum}"),
    ],
)
def test_operands_and_prompts_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic(**options)


@pytest.mark.parametrize("target", ["1", "15", "-5", "-15", "1551"])
def test_verifiers_agree_on_every_sequence(target: str) -> None:
    width = 4
    completions = [list(ids) for ids in itertools.product((PAD, EOS, IDS["1"], IDS["5"], IDS["-"]), repeat=width)]
    correct = assert_agree(completions, target, width)
    free = width - len(target) - 1  # places after EOS, where anything may stand
    assert correct == (5**free if free >= 0 else 0)


def test_verifiers_agree_on_near_misses() -> None:
    rng, width, symbols = random.Random(0), 6, [PAD, 1, EOS, *IDS.values()]
    for target in ("0", "9", "15", "81", "-7", "144", "-9999"):
        right, _ = encode(target, width)
        completions = [right]
        for _ in range(300):
            ids = list(right)
            for _ in range(rng.randint(0, 3)):
                ids[rng.randrange(width)] = rng.choice(symbols)
            completions.append(ids)
        assert 1 <= assert_agree(completions, target, width) < len(completions)


def test_nothing_outside_the_masks_is_read() -> None:
    answer, answer_mask = encode("15", 5)
    rows = [[*answer[:3], a, b] for a, b in ((0, 0), (EOS, EOS), (IDS["1"], PAD))]
    masks = np.array([[answer_mask] * 3])
    assert verify_tokens(np.array([rows]), masks, np.array([answer]), np.array([answer_mask])).all()


@pytest.mark.parametrize(
    ("text", "truncated", "verdict"),
    [
        ("15", False, Verdict.correct),
        ("15", True, Verdict.too_long),
        ("-15", False, Verdict.wrong),
        ("015", False, Verdict.wrong),
        ("+15", False, Verdict.unparsable),
        (" 15", False, Verdict.unparsable),
        ("15\n", False, Verdict.unparsable),
        ("1_5", False, Verdict.unparsable),
        ("１５", False, Verdict.unparsable),
        ("¹⁵", False, Verdict.unparsable),
        ("15.0", False, Verdict.unparsable),
        ("--15", False, Verdict.unparsable),
        ("\ud800\x00", False, Verdict.unparsable),
        ("9" * 1_000_000, False, Verdict.wrong),
        ("9**9**9**9", False, Verdict.unparsable),
    ],
)
def test_verify(text: str, truncated: bool, verdict: Verdict) -> None:
    start = time.perf_counter()
    assert verify(text, "15", truncated) is verdict
    assert time.perf_counter() - start < 0.5


def test_zero_has_one_spelling() -> None:
    assert [verify(text, "0", False).reward for text in ("0", "-0", "00", "")] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("options", [{"operators": "/"}, {"operators": "++"}, {"operators": ""}, {"operand_max": -1}])
def test_refuses_impossible_options(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        make_task("arithmetic", **options)


def test_make_task() -> None:
    assert make_task("arithmetic", operators="*").examples == arithmetic("*").examples
    with pytest.raises(ValueError, match="unknown task 'sums'; known tasks: arithmetic, stories"):
        make_task("sums")
    with pytest.raises(TypeError, match="operand"):
        make_task("arithmetic", operand=3)


def test_verifiers_are_found_by_import_path() -> None:
    tasks: list[Task] = [make_task("arithmetic"), make_task("stories")]
    for task in tasks:
        assert pickle.loads(pickle.dumps(task.verify)) is task.verify


def test_tasks_load_neither_jax_nor_numpy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); before = set(sys.modules)\n"
        "import grpo_jax.tasks, grpo_jax.tasks.worker_main, grpo_jax.tasks.workers\n"
        "seconds = time.perf_counter() - start; loaded = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not loaded & {'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'ml_collections', 'tokenizers'}, loaded\n"
        "print(f'imported in {seconds * 1e3:.0f} ms'); assert seconds < 2"
    )
    print(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_an_answer_that_does_not_fit_matches_nothing() -> None:
    nothing, tokens = np.zeros((1, 3), bool), np.ones((1, 3), int)
    assert not verify_tokens(tokens[:, None, :], nothing[:, None, :], tokens, nothing).any()
    assert not verify_tokens(
        tokens[:, None, :], nothing[:, None, :], tokens, ~nothing
    ).any()  # what is masked is not there

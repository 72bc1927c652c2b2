"""Prompts as arrays: never cut, broken rows named, and those that are too long refused or dropped."""

import numpy as np
import pytest

from grpo_jax.data import ByteTokenizer, CharTokenizer, HFTokenizer, encode_prompts, prompt_batch, read_chat
from grpo_jax.tasks import Example, Task, arithmetic, stories
from tests.data.chat_folders import make_folders

TOKENIZER = CharTokenizer("0123456789+=")


def test_encoding():
    task, prompts = encode_prompts(arithmetic("+", 9), TOKENIZER, stop_id=2, max_prompt=5, max_completion=4)
    assert task.examples == arithmetic("+", 9).examples
    assert prompts.tokens.shape == (100, 5)
    assert TOKENIZER.decode(prompts.tokens[78].tolist()) == "7+8="
    assert prompts.tokens[78, 0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(prompts.answers[78].tolist()) == "15"
    assert prompts.answer_mask[78].tolist() == [True, True, True, False]
    assert prompts.answers[78, 2] == 2


def test_an_answer_that_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match=r"prompt 19 .*'1\+9='.* has 3 tokens.*max_completion=2"):
        encode_prompts(arithmetic("+", 9), TOKENIZER, stop_id=2, max_prompt=5, max_completion=2)


def test_padding_is_on_the_left():
    _, prompts = encode_prompts(arithmetic("+", 10), TOKENIZER, stop_id=2, max_prompt=7, max_completion=4)
    assert (np.sort(prompts.mask, axis=1) == prompts.mask).all()
    assert prompts.mask[0].sum() == 5
    batch = prompt_batch(prompts, np.array([120, 0]))
    assert batch.index.tolist() == [120, 0]
    assert batch.mask.sum(1).tolist() == [7, 5]


@pytest.mark.parametrize(
    ("task", "most", "message"), [(arithmetic(), 4, "has 5 tokens.*max_prompt=4"), (stories(), 64, "'O'")]
)
def test_prompts_that_do_not_fit_are_named(task, most, message):
    with pytest.raises(ValueError, match=rf"prompt 0 of task '{task.name}'.*{message}"):
        encode_prompts(task, TOKENIZER, stop_id=2, max_prompt=most, max_completion=4)


LIMITS = {"stop_id": 2, "max_prompt": 5, "max_completion": 3}
BYTES = ByteTokenizer()


def zeros(example):
    return "0" * example.prompt.count("x")


def echo(*prompts, demonstrations=None):
    """Prompts whose target is their place."""
    return Task("echo", tuple(Example(prompt, str(i)) for i, prompt in enumerate(prompts)), len, None, demonstrations)


def rows(prompts):
    return [row[mask].tolist() for row, mask in zip(prompts.tokens, prompts.mask, strict=True)]


def test_what_is_too_long_is_dropped_whole():
    """Prompts of 3 to 6 tokens with their BOS, answers of 1 to 4 with their stop: rows 0, 2 and 4 fit both limits."""
    task = echo("01", "01234", "x234", "xxx", "0xx", demonstrations=zeros)
    shorter, prompts = encode_prompts(task, BYTES, **LIMITS, too_long="drop")
    assert shorter == task._replace(examples=tuple(task.examples[row] for row in (0, 2, 4)))
    assert [BYTES.decode(ids) for ids in rows(prompts)] == ["01", "x234", "0xx"]
    assert prompts.mask.sum(1).tolist() == [3, 5, 4] and prompts.answer_mask.sum(1).tolist() == [1, 2, 3]
    assert prompts.tokens.dtype == prompts.answers.dtype == np.int32
    narrow, prompts = encode_prompts(task, BYTES, **(LIMITS | {"max_prompt": 3}), too_long="drop")
    assert [example.target for example in narrow.examples] == ["0"] and prompts.tokens.shape == (1, 3)
    assert encode_prompts(shorter, BYTES, **LIMITS, too_long="drop")[0] is shorter


def test_what_is_too_long_is_counted():
    task = echo("01", "01234", "0123456", "xxx", demonstrations=zeros)
    with pytest.raises(ValueError, match=r"prompt 1") as refusal:
        encode_prompts(task, BYTES, **LIMITS)
    assert str(refusal.value) == (
        "prompt 1 of task 'echo' ('01234') has 6 tokens; data.max_prompt=5 allows 5. 3 of 4 prompts do not fit: "
        "data.max_prompt=8 and rollout.max_completion=4 would hold all, data.too_long='drop' leaves them out"
    )
    for policy in ("error", "drop"):
        with pytest.raises(
            ValueError, match=r"prompt 0 .* 2 of 2 prompts do not fit: data.max_prompt=8 would hold all$"
        ):
            encode_prompts(echo("012345", "0123456"), BYTES, **LIMITS, too_long=policy)
    with pytest.raises(ValueError, match="too_long='cut' is neither 'error' nor 'drop'"):
        encode_prompts(task, BYTES, **LIMITS, too_long="cut")


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_broken_rows_are_never_dropped(policy):
    silent = ByteTokenizer()
    silent.adds_bos = False
    for task, tokenizer, message in (
        (echo("01", "a\ud83d"), BYTES, r"prompt 1 of task 'echo' \('a\\ud83d'\): .* surrogate pair at character 1"),
        (echo("1", demonstrations=lambda _: "\udc00"), BYTES, "prompt 0 .* surrogate pair at character 0"),
        (echo("0", ""), silent, r"prompt 1 of task 'echo' \(''\): it has no tokens"),
        (echo(), BYTES, "task 'echo' has no prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_prompts(task, tokenizer, **LIMITS, too_long=policy)


def test_texts_are_taken_as_they_are():
    texts = ["\0", "\ufeffa", "a\u2028b\r\n", "<s></s>", "", "é" * 500_000]
    _, prompts = encode_prompts(echo(*texts), BYTES, stop_id=2, max_prompt=1_000_001, max_completion=1)
    assert rows(prompts) == [[1, *(3 + byte for byte in text.encode())] for text in texts]


def test_the_bos_is_there_where_the_tokenizer_adds_it():
    tokenizer = ByteTokenizer()
    for adds in (True, False):
        tokenizer.adds_bos = adds
        assert rows(encode_prompts(echo("01", "0"), tokenizer, **LIMITS)[1]) == [
            [1] * adds + [51, 52],
            [1] * adds + [51],
        ]


def test_prompts_of_the_real_model_begin_with_its_bos(shared):
    tokenizer = HFTokenizer(shared / "models" / "stories260k")
    _, prompts = encode_prompts(echo("Once upon a time"), tokenizer, stop_id=2, max_prompt=5, max_completion=1)
    assert prompts.tokens.tolist() == [[1, 403, 407, 261, 378]]


def test_a_chat_makes_the_whole_prompt(tmp_path):
    """Its ids alone, no second BOS; its refusals name the row; answers are the tokenizer's, and the stop."""
    tokenizer = HFTokenizer(make_folders(tmp_path)["headers"])
    chat = read_chat(tokenizer)
    limits = {"stop_id": tokenizer.stop_ids[0], "max_prompt": 200, "max_completion": 3, "chat": chat}
    _, prompts = encode_prompts(echo("How many?", "x", demonstrations=zeros), tokenizer, **limits)
    assert rows(prompts) == [chat.encode("How many?"), chat.encode("x")]
    assert all(ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1 for ids in rows(prompts))
    assert prompts.answers[1][prompts.answer_mask[1]].tolist() == [*tokenizer.encode("0"), tokenizer.stop_ids[0]]
    with pytest.raises(ValueError, match=r"prompt 1 of task 'echo' \(' '\): the user's text is empty"):
        encode_prompts(echo("a", " "), tokenizer, **limits)

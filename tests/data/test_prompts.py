"""Prompts as arrays, and the order of visits as a function of (seed, iteration)."""

import numpy as np
import pytest

from grpo_jax.data import CharTokenizer, encode_prompts, prompt_batch, prompt_order
from grpo_jax.tasks import arithmetic, stories

TOKENIZER = CharTokenizer("0123456789+=")


def test_encoding():
    found = encode_prompts(arithmetic("+", 9), TOKENIZER, stop_id=2, max_prompt=5, max_completion=4)
    assert found.tokens.shape == (100, 5)
    assert TOKENIZER.decode(found.tokens[78].tolist()) == "7+8="
    assert found.tokens[78, 0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(found.answers[78].tolist()) == "15"
    assert found.answer_mask[78].tolist() == [True, True, True, False]
    assert found.answers[78, 2] == 2


def test_an_answer_that_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match=r"prompt 19 .*'1\+9='.* has 3 tokens.*max_completion=2"):
        encode_prompts(arithmetic("+", 9), TOKENIZER, stop_id=2, max_prompt=5, max_completion=2)


def test_padding_is_on_the_left():
    found = encode_prompts(arithmetic("+", 10), TOKENIZER, stop_id=2, max_prompt=7, max_completion=4)
    assert (np.sort(found.mask, axis=1) == found.mask).all()
    assert found.mask[0].sum() == 5
    batch = prompt_batch(found, np.array([120, 0]))
    assert batch.index.tolist() == [120, 0]
    assert batch.mask.sum(1).tolist() == [7, 5]


@pytest.mark.parametrize(
    ("task", "most", "message"), [(arithmetic(), 4, "has 5 tokens.*max_prompt=4"), (stories(), 64, "'O'")]
)
def test_prompts_that_do_not_fit_are_named(task, most, message):
    with pytest.raises(ValueError, match=rf"prompt 0 of task '{task.name}'.*{message}"):
        encode_prompts(task, TOKENIZER, stop_id=2, max_prompt=most, max_completion=4)


@pytest.mark.parametrize(("num_prompts", "batch"), [(12, 4), (13, 4), (5, 5), (1, 1)])
def test_an_epoch_visits_each_row_at_most_once(num_prompts, batch):
    per_epoch = num_prompts // batch
    visits = [prompt_order(3, n, num_prompts=num_prompts, batch=batch) for n in range(4 * per_epoch)]
    for epoch in range(4):
        rows = np.concatenate(visits[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(set(rows.tolist())) == len(rows) == per_epoch * batch
        assert set(rows.tolist()) <= set(range(num_prompts))


def test_the_order_is_a_function_of_seed_and_iteration():
    orders = [tuple(prompt_order(seed, n, num_prompts=50, batch=10)) for seed in (0, 1) for n in (0, 1, 5, 6)]
    assert len(set(orders)) == len(orders)
    assert tuple(prompt_order(1, 5, num_prompts=50, batch=10)) == orders[6]

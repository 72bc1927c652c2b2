"""The order of visits: whole epochs, uniform permutations, and a pure function of (seed, iteration)."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.data import prompt_order

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(("num_prompts", "batch"), [(12, 4), (13, 4), (5, 5), (1, 1), (7473, 64), (70_000, 35_000)])
def test_an_epoch_visits_every_row_once_up_to_the_remainder(num_prompts: int, batch: int) -> None:
    per_epoch = num_prompts // batch
    left_over = set()
    for epoch in range(3):
        visits = [
            prompt_order(3, epoch * per_epoch + n, num_prompts=num_prompts, batch=batch) for n in range(per_epoch)
        ]
        assert all(rows.shape == (batch,) and rows.dtype == np.int64 for rows in visits)
        rows = set(np.concatenate(visits).tolist())
        assert len(rows) == per_epoch * batch
        assert rows <= set(range(num_prompts))
        left_over |= {frozenset(range(num_prompts)) - rows}
    assert len(left_over) == (1 if num_prompts % batch == 0 else 3)  # others are left over in the next epoch


def test_golden_values() -> None:
    """The same on every Python, NumPy, grain and machine, or runs could not be resumed there."""

    def rows(seed: int, iteration: int, num_prompts: int, batch: int) -> list[int]:
        return prompt_order(seed, iteration, num_prompts=num_prompts, batch=batch).tolist()

    assert rows(0, 0, 10, 4) == [9, 0, 5, 1]
    assert rows(0, 1, 10, 4) == [8, 3, 4, 2]
    assert rows(0, 2, 10, 4) == [4, 0, 9, 1]
    assert rows(7, 5, 100, 8) == [97, 57, 46, 47, 33, 86, 9, 96]
    assert rows(2**32 - 1, 10**6, 7473, 5) == [3769, 780, 2542, 241, 6687]


def test_every_permutation_is_as_likely() -> None:
    """χ² of the 24 orders of 4 rows over 2,400 epochs: 23 degrees of freedom, 95 % of values from 12 to 38."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2400):
        counts[tuple(prompt_order(11, epoch, num_prompts=4, batch=4).tolist())] += 1
    assert 8 < sum((count - 100) ** 2 / 100 for count in counts.values()) < 50


def test_neighbouring_seeds_and_epochs_share_no_order() -> None:
    orders = {
        tuple(prompt_order(seed, epoch, num_prompts=50, batch=50).tolist()) for seed in range(20) for epoch in range(20)
    }
    assert len(orders) == 400


def test_a_resumed_run_needs_no_replay() -> None:
    iteration = 10**12 + 5  # no earlier iteration is visited on the way
    code = (
        "from grpo_jax.data import prompt_order\n"
        f"print(prompt_order(4, {iteration}, num_prompts=1000, batch=7).tolist())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == str(prompt_order(4, iteration, num_prompts=1000, batch=7).tolist())

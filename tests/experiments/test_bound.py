"""The bound on R² against the R² of enumerated policies; the table is made by the command."""

import jax
import pytest

from experiments import explained


@pytest.mark.parametrize("rank", [16, 256])
def test_the_bound_is_the_truth_where_features_are_even_and_below_it_where_not(rank):
    with jax.enable_x64(True):
        even, uneven = (explained.measure(rank, spread, 8, 12) for spread in explained.SPREADS)
    assert even.r2 == pytest.approx(uneven.r2, abs=1e-6)
    assert even.bound == pytest.approx(even.r2, abs=0.03)
    assert even.naive < even.r2 - 0.05
    assert even.inside >= 0.8
    assert uneven.naive < uneven.bound < uneven.r2
    assert min(even.below, uneven.below) >= 0.9

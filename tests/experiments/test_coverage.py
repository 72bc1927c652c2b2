"""The coverage of the predicted mean, on few repetitions; the table is made by the command."""

import doctest

import numpy as np

from experiments import coverage


def test_averaging_covers_where_mapping_does_not():
    """G = 16, β = 0.5, 16 samples: the case with a fold that mapping hits least."""
    case = coverage.Case(1.0, 3.0, 16, 0.5)
    cell = coverage.measure(case, 16, repetitions=20, seed=1)
    assert cell.mapped < 0.2 and cell.mapped_bias < -0.05
    assert cell.averaged >= 0.8 and abs(cell.averaged_bias) < 0.015
    assert cell.inside >= 0.8


def test_the_table_has_a_column_for_each_number_of_trials():
    cell = coverage.Cell(0.5, -0.1, 0.95, 0.0, 1.0)
    text = coverage.table({"one": {16: cell, 64: cell}})
    assert text.splitlines()[0] == "| p_ref; G, β | n = 16 | n = 64 |"
    assert text.splitlines()[2].count("**.95**") == 2
    draws = coverage.OTHERS[-1].draw(np.random.default_rng(0), 4)
    assert draws.shape == (4, coverage.PROMPTS) and set(np.unique(draws)) == {0.1, 0.6}


def test_examples():
    assert doctest.testmod(coverage).failed == 0

"""A part of the attacks on run directories; ``python -m tests.attacks`` makes all of them."""

import itertools

import pytest

from tests.attacks import attacked, edits, flips, make_states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_what_is_damaged_ends_in_the_same_bytes_or_in_words(tmp_path):
    states, said = make_states(tmp_path), []
    chosen = itertools.chain(flips(states, 5), itertools.islice(edits(states), 3, None, 8))
    counts = attacked(chosen, states, tmp_path / "attacked", lambda text, **_: said.append(text))
    assert counts["FAULT"] == 0, said
    assert counts["same"] > 0 and counts["refused"] > 0

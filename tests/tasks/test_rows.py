"""Rows of JSONL files that are too long: named, and never whole in memory."""

import tracemalloc

import pytest

from grpo_jax.tasks import rows
from grpo_jax.tasks.rows import count_rows, read_rows


def test_a_row_that_is_too_long_is_named_with_its_line(tmp_path):
    path, longest = tmp_path / "x.jsonl", rows.LINE_BYTES
    fits = b'{"a": "' + b"x" * (longest - 10) + b'"}\n'
    assert len(fits) == longest
    path.write_bytes(b'{"a": "y"}\n' + fits)
    assert count_rows(path) == len(read_rows(path, dict)) == 2
    path.write_bytes(b'{"a": "y"}\n' + b"x" + fits)
    for read in (count_rows, lambda path: read_rows(path, dict)):
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: a row of more than {longest:,} bytes"):
            read(path)
    assert len(read_rows(path, dict, 0, 1)) == 1  # what comes before can be read


def test_a_row_without_end_takes_no_more_memory_than_the_longest(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"x" * (10 * rows.LINE_BYTES))
    tracemalloc.start()
    with pytest.raises(ValueError, match="a row of more than"):
        count_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * rows.LINE_BYTES

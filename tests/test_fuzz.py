"""A part of the fuzz of command lines and calls; ``python -m tests.fuzz`` makes all of it."""

import itertools

import pytest

from tests import fuzz


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_calls_that_mean_nothing_are_answered_or_refused():
    for name, function, positional, named in fuzz.calls(200):
        assert fuzz.fault_of_call(function, positional, named) is None, (name, positional, named)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a fork where jax has threads: the child starts no program
def test_command_lines_that_mean_nothing_are_refused_in_words(tmp_path):
    for number, line in enumerate(itertools.islice(fuzz.command_lines(500, tmp_path), 40, 52)):
        workdir = tmp_path / str(number)
        line[1] = f"--workdir={workdir}"
        code, said = fuzz.run_line(line, workdir)
        assert fuzz.fault_of_line(code, said, workdir) is None, (line[2:], said)

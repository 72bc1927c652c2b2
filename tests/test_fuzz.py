"""Command lines and calls that mean nothing end in words: 500 of each, in a process that forks one for every line."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("part", ["--lines=500 --calls=0", "--lines=0 --calls=500"])
def test_what_means_nothing_is_answered_or_refused_in_words(part):
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *part.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

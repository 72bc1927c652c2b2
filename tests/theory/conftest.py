"""Double precision for whole test files that ask for it: the reference values have twelve digits."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield

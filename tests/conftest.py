"""Eight CPU devices, the XLA flags of every command line, strict dtypes and ranks, no GPU: set before jax starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_jax.environment import prepare_environment

prepare_environment()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def release_programs() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process may have 65,530: more would crash it."""
    yield
    jax.clear_caches()


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real models and data in {SHARED}, which is not there")
    return SHARED

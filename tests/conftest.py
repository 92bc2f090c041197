"""Hostile defaults: eight devices, errors for rank promotion, and fixtures that forbid transfers or allow float64."""

import os
import shutil
import tempfile

# Before JAX is imported: it reads these once. Workers of pytest-xdist and subprocesses inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from collections.abc import Iterator

import jax
import pytest

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Programs are compiled once for all workers, modules and subprocesses of a run: most of what tests cost."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="compiled-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def _compiled_anew() -> Iterator[None]:
    """Drops a module's programs at its end: they fill memory, and past 8192 JAX keeps no more (jax#39078)."""
    yield
    jax.clear_caches()


@pytest.fixture
def no_transfers() -> Iterator[None]:
    """An implicit transfer between host and device, in either direction, is an error."""
    with jax.transfer_guard("disallow"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Arrays made in this test may be float64."""
    with enable_x64(True):
        yield

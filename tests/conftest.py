import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILED = ROOT / ".compiled"
MOST_BYTES_COMPILED = 2**30


def _drop_oldest_compiled():
    """Keep the newest entries of the compilation cache, up to a size."""
    size = 0
    for entry in sorted(COMPILED.glob("*"), key=lambda entry: -entry.stat().st_mtime):
        size += entry.stat().st_size
        if size > MOST_BYTES_COMPILED:
            entry.unlink(missing_ok=True)


# Most of the suite's time is compiling. JAX reads these environment variables when it is imported, and processes that
# tests start inherit them. XLA_FLAGS= in the environment asks for code as users run it: XLA's own choices, optimised.
if "XLA_FLAGS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        # The older of two code generators, which compiles twice as fast; later versions have one, and refuse the flag.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What was compiled once serves every test, process and later run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _drop_oldest_compiled()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

import models  # noqa: F401  (sets up JAX's CPU thread pool before JAX starts it)

# The reference is checked in float64; tests of the fast path pass float32 arrays explicitly.
jax.config.update("jax_enable_x64", True)

# Linux gives a process 65,530 memory maps, and every compiled function holds some.
MOST_MAPS = 40_000


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions_before_memory_maps_run_out():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture
def optimised():
    """Compiles what the test traces first with XLA's optimisations: for tests that mostly run."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1")

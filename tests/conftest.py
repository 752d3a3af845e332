import gc
import os
from importlib.metadata import version
from pathlib import Path

# Most of the suite's time is compiling. These are environment variables as processes that tests start inherit them.
# JAX reads them when it is imported. An empty XLA_FLAGS asks for code as users run it, optimised by XLA.
if "XLA_FLAGS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        # The older of two code generators compiles twice as fast; later versions have one and refuse the flag.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# What is compiled once serves all tests, all processes and later runs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

from models.workers import give_jax_threads

give_jax_threads()

# Tracing makes many objects that stay: looking for garbage as often as Python does takes a tenth of the time.
gc.set_threshold(10_000)

# The reference is checked in float64; tests of the fast path pass float32 arrays explicitly.
jax.config.update("jax_enable_x64", True)

# What a property draws is a function of the command: no database, no clock. A failure prints one case.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=[phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain],
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

COMPILED = Path(__file__).parents[1] / ".compiled"
MOST_BYTES_COMPILED = 2**30
# Linux gives a process 65,530 memory maps, of which every compiled function holds some.
MOST_MAPS, MOST_RESIDENT_BYTES = 40_000, 2**31


def pytest_sessionfinish(session):
    """Drop the oldest entries of our own compilation cache beyond a size."""
    if hasattr(session.config, "workerinput"):
        return
    size = 0
    for entry in sorted(COMPILED.glob("*"), key=lambda entry: -entry.stat().st_mtime):
        size += entry.stat().st_size
        if size > MOST_BYTES_COMPILED:
            entry.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions_when_memory_runs_short():
    yield
    process = Path("/proc/self")
    if process.exists():
        maps = (process / "maps").read_bytes().count(b"\n")
        resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if maps > MOST_MAPS or resident > MOST_RESIDENT_BYTES:
            jax.clear_caches()


@pytest.fixture
def optimised():
    """Compile with XLA's optimisations what the test traces first, in tests that run longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

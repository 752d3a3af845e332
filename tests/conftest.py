import atexit
import os
import shutil
import tempfile

# Most of the suite's time is compiling, and many tests compile the same functions: once for all of them, and for the
# processes they start. Read by JAX when it is imported; the workers of pytest-xdist inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

import models  # noqa: F401  (sets up JAX's CPU thread pool before JAX starts it)

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


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_functions():
    """Every compiled function holds some memory maps, of which Linux gives a process 65,530; a worker needs more."""
    yield
    jax.clear_caches()

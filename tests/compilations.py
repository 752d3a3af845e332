"""Time, traces and XLA compilations of every test: `python -m pytest -p tests.compilations FILE...`.

The table at the end lists the slowest tests first. "compiled" counts the programs that were asked of XLA, of which
"cached" came out of the persistent compilation cache. "traced" counts the functions that were traced to a jaxpr, nested
ones included. Seconds of tracing are not listed, because those of nested functions would count twice.
"""

import time
from collections import Counter

import pytest

_COUNTED = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
    "/jax/compilation_cache/cache_hits": "cached",
}
_ROWS_SHOWN = 60
_counts: Counter = Counter()
_rows = {}


def _count_event(event, **_):
    if event in _COUNTED:
        _counts[_COUNTED[event]] += 1


def _count_duration(event, seconds, **_):
    _count_event(event)
    if event == "/jax/core/compile/backend_compile_duration":
        _counts["compiling"] += seconds


def pytest_configure(config):
    # Not at the top: tests/conftest.py sets the environment that JAX reads when it is imported.
    from jax import monitoring

    monitoring.register_event_listener(_count_event)
    monitoring.register_event_duration_secs_listener(_count_duration)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _counts.clear()
    _counts["start"] = time.perf_counter()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    result = yield
    counts = {name: value for name, value in _counts.items() if name != "start"}
    # Travels with the report of the teardown, also from a worker of pytest-xdist.
    item.user_properties.append(("compilations", {**counts, "seconds": time.perf_counter() - _counts["start"]}))
    return result


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _rows[report.nodeid] = dict(report.user_properties)["compilations"]


def pytest_terminal_summary(terminalreporter):
    columns = ("seconds", "compiling", "compiled", "cached", "traced")
    total: Counter = Counter()
    for row in _rows.values():
        total.update(row)
    slowest = sorted(_rows.items(), key=lambda item: -item[1]["seconds"])[:_ROWS_SHOWN]
    terminalreporter.section("compilations")
    terminalreporter.write_line(" ".join(f"{column:>9}" for column in columns))
    for name, row in [*slowest, (f"all {len(_rows)} tests", total)]:
        terminalreporter.write_line(" ".join(f"{row.get(column, 0):9.1f}" for column in columns) + f"  {name}")

"""Running many checks: in this process or in several, each result handed over as soon as it is there."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import jax

from theory_checks.check import Check, Plan, Result, evaluate


def enable_float64() -> None:
    jax.config.update("jax_enable_x64", True)


def run_checks(checks: Sequence[Check], plan: Plan, jobs: int) -> Iterator[Result]:
    """Results in the order in which they come; with several jobs each check runs in a process of its own pool."""
    if jobs == 1 or len(checks) == 1:
        enable_float64()
        for check in checks:
            yield evaluate(check, plan)
        return
    # A fresh interpreter each: JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(checks)), context, initializer=enable_float64) as pool:
        waiting = {pool.submit(evaluate, check, plan): check for check in checks}
        for future in as_completed(waiting):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Result(waiting[future], None, 0.0, "the process that ran it died; run it alone with --only")

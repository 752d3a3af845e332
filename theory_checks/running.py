"""Running many checks: in this process or in several, each result handed over as soon as it is there."""

from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import jax

from models import workers
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
    for check, future in workers.as_finished(partial(evaluate, plan=plan), checks, jobs, enable_float64):
        try:
            yield future.result()
        except BrokenProcessPool:
            yield Result(check, None, 0.0, "the process that ran it died; run it alone with --only")

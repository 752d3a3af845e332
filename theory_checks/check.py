"""What a check is: a claim that must hold, a counterexample that must fail, and the figures that decide.

`run_checks` runs many of them, in this process or in several, each result handed over as soon as it is there.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from models import workers

# For functions that are called a few hundred times on tiny arrays, where compiling is most of the cost: halves the time
# of compiling, and changes results by rounding only.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

Mark = Literal["paper", "second-hand", "derived", "ours"]


@dataclass(frozen=True)
class Plan:
    """How much of a check to run: all of it, or `quick`, just enough to tell right from wrong; and the seed of draws.

    `cases` replaces a check's own number of drawn cases.
    """

    quick: bool = False
    cases: int | None = None
    seed: int = 0

    def count(self, standard: int, quick: int) -> int:
        """The number of cases to draw, for a check whose own numbers are these."""
        return self.cases if self.cases is not None else self.pick(standard, quick)

    def pick(self, standard: Any, quick: Any) -> Any:
        """The quick value under a quick plan, the standard one otherwise."""
        return quick if self.quick else standard


@dataclass(frozen=True)
class Outcome:
    """What running a check gave; `figure` decides `holds`, `counterexample_figure` decides `counterexample_fails`.

    A claim holds when its figure is at most the tolerance of its check, and whatever else `details` lists holds too.
    """

    cases: int
    figure: float
    holds: bool
    counterexample_figure: float
    counterexample_fails: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One claim: where it must hold, where it must fail, to what tolerance, and how to find out.

    `figure_name` says what the figure is and its unit.
    """

    id: str
    claim: str
    statement: str
    mark: Mark
    regime: str
    counterexample: str
    tolerance: float
    tolerance_reason: str
    figure_name: str
    run: Callable[[Plan], Outcome]


@dataclass(frozen=True)
class Result:
    """A check with its outcome and the seconds it took; `error` replaces an outcome that never came."""

    check: Check
    outcome: Outcome | None
    seconds: float
    error: str | None = None

    @property
    def verdict(self) -> str:
        """ "holds", "fails", or "error" where the check could not finish."""
        return "error" if self.outcome is None else "holds" if self.outcome.holds else "fails"

    @property
    def counterexample_verdict(self) -> str:
        """ "fails" is what a counterexample must do; "holds" means that the check could not tell it apart."""
        return "error" if self.outcome is None else "fails" if self.outcome.counterexample_fails else "holds"

    @property
    def as_stated(self) -> bool:
        return self.verdict == "holds" and self.counterexample_verdict == "fails"

    def to_json(self) -> dict[str, Any]:
        """The fields of check and outcome as JSON values; NaN and inf, which JSON lacks, become strings."""
        check = {name: value for name, value in vars(self.check).items() if name != "run"}
        missing = {"cases": 0, "figure": None, "counterexample_figure": None, "details": {"error": self.error}}
        outcome = missing if self.outcome is None else vars(self.outcome)
        verdicts = {name: getattr(self, name) for name in ("verdict", "counterexample_verdict", "as_stated")}
        seconds = {"seconds": round(self.seconds, 2)}
        return _json_value(check | {name: outcome[name] for name in missing} | verdicts | seconds)


def evaluate(check: Check, plan: Plan | None = None) -> Result:
    """Run a check and time it; one that raises has not come out as stated, and the others still run."""
    start = time.perf_counter()
    try:
        outcome = check.run(plan or Plan())
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        return Result(check, None, time.perf_counter() - start, f"{type(error).__name__}: {first_line}")
    return Result(check, outcome, time.perf_counter() - start)


def _enable_float64() -> None:
    jax.config.update("jax_enable_x64", True)


def run_checks(checks: Sequence[Check], plan: Plan, jobs: int) -> Iterator[Result]:
    """Results in the order in which they come; with several jobs each check runs in a process of its own pool."""
    if jobs == 1 or len(checks) == 1:
        _enable_float64()
        yield from (evaluate(check, plan) for check in checks)
        return
    for check, future in workers.as_finished(functools.partial(evaluate, plan=plan), checks, jobs, _enable_float64):
        try:
            yield future.result()
        except BrokenProcessPool:
            yield Result(check, None, 0.0, "the process that ran it died; run it alone with --only")


@dataclass
class Worst:
    """The largest value seen, and the case it belongs to; NaN counts as infinite."""

    figure: float = 0.0
    case: str | None = None

    def see(self, value: Any, case: object) -> None:
        number = math.inf if math.isnan(value) else float(value)
        if self.case is None or number > self.figure:
            self.figure, self.case = number, repr(case)

    def to_json(self) -> dict[str, Any]:
        return {"figure": self.figure, "case": self.case}


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

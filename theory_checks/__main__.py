"""Run the checks: `python -m theory_checks [--json [PATH]] [--only ID] [--quick] [--sabotage]`.

Exit status 0 if every claim came out as stated (or every sabotage was caught), 1 if one did not, 2 for bad input.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from models import cli
from prob_transformer.files import provenance, write_json
from theory_checks.check import Check, Plan, Result
from theory_checks.registry import select
from theory_checks.running import run_checks

LOG_WIDTH = 170
STDOUT = Path("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m theory_checks", description="Check the claims of the theory.")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STDOUT,
        metavar="PATH",
        help="write every figure to this file, or without PATH to standard output instead of the table",
    )
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="run this check; may be repeated")
    parser.add_argument("--quick", action="store_true", help="just enough of each check to tell right from wrong")
    parser.add_argument("--cases", type=int, metavar="N", help="draw N cases in every check that draws cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of all drawn cases (default: %(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes to run the checks in (default: %(default)s)",
    )
    parser.add_argument(
        "--sabotage", action="store_true", help="put mistakes into the library, one by one, and see which checks notice"
    )
    parser.add_argument("--mistake", action="append", default=[], metavar="NAME", help="with --sabotage: only this one")
    return parser


def _require_writable(path: Path) -> None:
    """ValueError unless a file can be written at `path`: found out before the checks run rather than after."""
    if path.is_dir():
        raise ValueError(f"--json: {path} is a folder; pass the path of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--json: {path} cannot be written ({error.strerror}); pass another path.") from None


def _require_options(options: argparse.Namespace) -> None:
    for name, smallest in (("jobs", 1), ("cases", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name}: got {value}; pass an integer of at least {smallest}.")
    if options.mistake and not options.sabotage:
        raise ValueError("--mistake: goes with --sabotage; add it.")
    if options.json not in (None, STDOUT):
        _require_writable(options.json)


def progress_bar() -> Progress:
    """A bar on standard error that disappears when done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def print_table(table: Table) -> None:
    # A log file has no width of its own: give the table room there.
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def _run(checks: Sequence[Check], plan: Plan, jobs: int) -> list[Result]:
    found: dict[str, Result] = {}
    with progress_bar() as progress:
        task = progress.add_task(f"checks, {jobs} at a time", total=len(checks))
        for result in run_checks(checks, plan, jobs):
            found[result.check.id] = result
            progress.advance(task)
    return [found[check.id] for check in checks]


def _table(results: Sequence[Result]) -> Table:
    table = Table("id", "mark", "claim")
    for name in ("cases", "figure", "tolerance"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("counterexample")
    table.add_column("s", justify="right")
    for result in results:
        check, outcome = result.check, result.outcome
        colour = "green" if result.as_stated else "red"
        table.add_row(
            check.id,
            check.mark,
            check.claim,
            f"{outcome.cases:,}" if outcome else "-",
            f"{outcome.figure:.2g}" if outcome else "-",
            f"{check.tolerance:.2g}",
            f"[{colour}]{result.verdict}[/]",
            f"[{colour}]{result.counterexample_verdict}[/]"
            + (f" ({outcome.counterexample_figure:.4g})" if outcome else ""),
            f"{result.seconds:.1f}",
        )
    return table


def _check(options: argparse.Namespace) -> int:
    plan = Plan(options.quick, options.cases, options.seed)
    results = _run(select(options.only), plan, options.jobs)
    as_stated = all(result.as_stated for result in results)
    if options.json is not None:
        configuration = {name: getattr(options, name) for name in ("only", "quick", "cases", "jobs")}
        rows = [result.to_json() for result in results]
        report = {"provenance": provenance(plan.seed, configuration), "checks": rows, "as_stated": as_stated}
        if options.json == STDOUT:
            print(json.dumps(report, indent=1))
            return 0 if as_stated else 1
        write_json(options.json, report)
    print_table(_table(results))
    for result in results:
        if result.error is not None:
            print(f"{result.check.id}: could not finish: {result.error}")
    stated = sum(result.as_stated for result in results)
    print(f"{stated} of {len(results)} checks came out as stated, with seed {plan.seed}.")
    return 0 if as_stated else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    options = _parser().parse_args(arguments)
    _require_options(options)
    if options.sabotage:
        from theory_checks import sabotage

        return sabotage.main(options)
    return _check(options)


if __name__ == "__main__":
    cli.run(main)

"""Run the checks: `python -m theory_checks [--json PATH] [--only ID]`.

Exit status 0 if every claim came out as stated, 1 if one did not, 2 for bad input.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from prob_transformer.provenance import provenance, write_json
from theory_checks.check import Check, Result, evaluate
from theory_checks.registry import select

_LOG_WIDTH = 170


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m theory_checks", description="Check the claims of the theory.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every figure to this file")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="run this check; may be repeated")
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


def _run(checks: Sequence[Check]) -> list[Result]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(checks))
        for check in checks:
            progress.update(task, description=check.id)
            results.append(evaluate(check))
            progress.advance(task)
    return results


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
            str(outcome.cases) if outcome else "-",
            f"{outcome.figure:.2g}" if outcome else "-",
            f"{check.tolerance:.0e}",
            f"[{colour}]{result.verdict}[/]",
            f"[{colour}]{result.counterexample_verdict}[/]"
            + (f" ({outcome.counterexample_figure:.4g})" if outcome else ""),
            f"{result.seconds:.1f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments."""
    jax.config.update("jax_enable_x64", True)
    options = _parser().parse_args(arguments)
    try:
        checks = select(options.only)
        if options.json is not None:
            _require_writable(options.json)
        results = _run(checks)
        as_stated = all(result.as_stated for result in results)
        if options.json is not None:
            configuration = {"only": options.only, "json": str(options.json)}
            rows = [result.to_json() for result in results]
            write_json(
                options.json, {"provenance": provenance(None, configuration), "checks": rows, "as_stated": as_stated}
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A log file has no width of its own: give the table room there.
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(_table(results))
    for result in results:
        if result.error is not None:
            print(f"{result.check.id}: could not finish: {result.error}")
    print(f"{sum(result.as_stated for result in results)} of {len(results)} checks came out as stated.")
    return 0 if as_stated else 1


if __name__ == "__main__":
    sys.exit(main())

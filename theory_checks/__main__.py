"""Run the checks: `python -m theory_checks [--json [PATH]] [--only ID] [--quick] [--sabotage]`.

Exit status 0 if every claim came out as stated (or every sabotage was caught), 1 if one did not, 2 for bad input.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from models import cli
from prob_transformer.files import atomic_path, provenance
from theory_checks import sabotage
from theory_checks.check import Plan, Result, run_checks
from theory_checks.claims import select
from theory_checks.sabotage import STDOUT


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


def _row(result: Result) -> list[str]:
    check, outcome = result.check, result.outcome
    counterexample = f" ({outcome.counterexample_figure:.4g})" if outcome else ""
    return [
        check.id,
        check.mark,
        check.claim,
        f"{outcome.cases:,}" if outcome else "-",
        f"{outcome.figure:.2g}" if outcome else "-",
        f"{check.tolerance:.2g}",
        result.verdict,
        result.counterexample_verdict + counterexample,
        f"{result.seconds:.1f}",
    ]


def _check(options: argparse.Namespace) -> int:
    checks, plan = select(options.only), Plan(options.quick, options.cases, options.seed)
    to_file = options.json not in (None, STDOUT)
    # Opened before the checks run: a path that cannot be written is found out now rather than after.
    with atomic_path(options.json) if to_file else nullcontext() as file:
        progress = tqdm(run_checks(checks, plan, options.jobs), "checks", len(checks), leave=False, unit="check")
        found = {result.check.id: result for result in progress}
        results = [found[check.id] for check in checks]
        stated = sum(result.as_stated for result in results)
        configuration = {name: getattr(options, name) for name in ("only", "quick", "cases", "jobs")}
        report = {
            "provenance": provenance(plan.seed, configuration),
            "checks": [result.to_json() for result in results],
            "as_stated": stated == len(results),
        }
        if file is not None:
            file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.json == STDOUT:
        print(json.dumps(report, indent=1))
    else:
        headings = ["id", "mark", "claim", "cases", "figure", "tolerance", "verdict", "counterexample", "s"]
        print(tabulate(map(_row, results), headings, maxcolwidths=[None, None, 60], disable_numparse=True))
        for result in results:
            if result.error is not None:
                print(f"{result.check.id}: could not finish: {result.error}")
        print(f"{stated} of {len(results)} checks came out as stated, with seed {plan.seed}.")
    return 0 if report["as_stated"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    options = _parser().parse_args(arguments)
    for name, smallest in (("jobs", 1), ("cases", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name}: got {value}; pass an integer of at least {smallest}.")
    if options.mistake and not options.sabotage:
        raise ValueError("--mistake: goes with --sabotage; add it.")
    return sabotage.main(options) if options.sabotage else _check(options)


if __name__ == "__main__":
    cli.run(main)

"""Measure and print the table: `python -m benchmarks --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. Exit status 0 when
all was measured, whatever the figures; 2 for bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.registry import select
from benchmarks.result import measure
from benchmarks.sizes import SMALLEST_ROUNDS, sizes_for
from benchmarks.table import show
from models import cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time, memory and agreement.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, and no more")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these sections; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=SMALLEST_ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    return parser


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    options = _parser().parse_args(arguments)
    for name, smallest in (("rounds", SMALLEST_ROUNDS), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name}: got {getattr(options, name)}; pass an integer of at least {smallest}.")
    sections = select(options.only)
    sizes = sizes_for(options.quick, options.seed, options.rounds)
    result = measure(options.out, sections, sizes, options.quick, _tell)
    show(result, options.out)
    return 0


if __name__ == "__main__":
    cli.run(main)

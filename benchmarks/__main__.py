"""Measure and print the table: `python -m benchmarks --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. Exit status 0 when
all was measured, whatever the figures; 2 for bad input.
"""

from collections.abc import Sequence

from benchmarks.registry import select
from benchmarks.result import measure, tell
from benchmarks.result import options as command_options
from benchmarks.sizes import SMALLEST_ROUNDS, sizes_for
from benchmarks.table import show
from models import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    parser = command_options("python -m benchmarks", "Time, memory and agreement.")
    parser.add_argument("--rounds", type=int, default=SMALLEST_ROUNDS, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name, smallest in (("rounds", SMALLEST_ROUNDS), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name}: got {getattr(options, name)}; pass an integer of at least {smallest}.")
    sections = select(options.only)
    sizes = sizes_for(options.quick, options.seed, options.rounds)
    result = measure(options.out, sections, sizes, options.quick, tell)
    show(result, options.out)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Inference against the truth: `python -m benchmarks.inference --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. Exit status 0 when
all was measured, whatever the figures; 2 for bad input. `python -m benchmarks.inference.page` writes
docs/inference_benchmark.md.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.inference.registry import SECTIONS
from benchmarks.inference.sizes import QUICK, Sizes
from benchmarks.registry import select
from benchmarks.result import measure
from benchmarks.table import show
from models import cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description="Inference against the truth.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, and no more")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these sections; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    options = _parser().parse_args(arguments)
    if options.seed < 0:
        raise ValueError(f"--seed: got {options.seed}; pass an integer of at least 0.")
    sections = select(options.only, SECTIONS)
    sizes = dataclasses.replace(QUICK if options.quick else Sizes(), seed=options.seed)
    jax.config.update("jax_enable_x64", True)
    result = measure(options.out, sections, sizes, options.quick, lambda message: print(message, file=sys.stderr))
    show(result, options.out, SECTIONS)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Inference against the truth: `python -m benchmarks.inference --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. Exit status 0 when
all was measured, whatever the figures; 2 for bad input. `python -m benchmarks.inference.page` writes
docs/inference_benchmark.md.
"""

import dataclasses
from collections.abc import Sequence

import jax

from benchmarks.inference.registry import SECTIONS
from benchmarks.inference.sizes import QUICK, Sizes
from benchmarks.registry import select
from benchmarks.result import measure, tell
from benchmarks.result import options as command_options
from benchmarks.table import show
from models import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    options = command_options("python -m benchmarks.inference", "Inference against the truth.").parse_args(arguments)
    if options.seed < 0:
        raise ValueError(f"--seed: got {options.seed}; pass an integer of at least 0.")
    sections = select(options.only, SECTIONS)
    sizes = dataclasses.replace(QUICK if options.quick else Sizes(), seed=options.seed)
    jax.config.update("jax_enable_x64", True)
    result = measure(options.out, sections, sizes, options.quick, tell)
    show(result, options.out, SECTIONS)
    return 0


if __name__ == "__main__":
    cli.run(main)

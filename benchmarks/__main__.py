"""Measure and print the tables: `python -m benchmarks --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. `python -m benchmarks
--page docs/benchmarks.md` writes the page from committed results alone. Exit status 0 when all was measured, whatever
the figures; 2 for bad input.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import agreement, kernel_time, peak_memory, training_step
from benchmarks.problem_sizes import SMALLEST_ROUNDS, sizes_for
from benchmarks.result_file import ROOT, command_line, measure
from benchmarks.result_tables import Section, chosen, load_published, markdown
from models import cli
from prob_transformer.files import write_text

SECTIONS: tuple[Section, ...] = (
    training_step.SECTION,
    kernel_time.SECTION,
    peak_memory.STEP_SECTION,
    peak_memory.KERNEL_SECTION,
    kernel_time.SCALING_SECTION,
    agreement.SECTION,
    training_step.SUBSAMPLING_SECTION,
)
RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = """# Benchmarks

Every number on this page comes from a result committed under [benchmarks/results](../benchmarks/results);
`python -m benchmarks --page docs/benchmarks.md` writes the page, and a test compares the two. `make benchmark` measures
again, on your machine.

In every round each contestant is timed once, right after an untimed run of its own, in an order rotated from round to
round, and ratios are taken within rounds. Nothing here was measured on an accelerator unless its heading says so."""


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """The text of the page from results by name, in the order of their names."""
    parts = [f"## {name}\n\n{markdown(results[name], SECTIONS, level=3)}" for name in sorted(results)]
    return "\n\n".join([INTRODUCTION, *parts]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    parser = command_line("python -m benchmarks", "Time, memory and agreement.")
    parser.add_argument("--rounds", type=int, default=SMALLEST_ROUNDS, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name, smallest in (("rounds", SMALLEST_ROUNDS), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name}: got {getattr(options, name)}; pass an integer of at least {smallest}.")
    if options.page:
        paths = options.results or sorted(RESULTS.glob("*.json"))
        if not paths:
            raise ValueError(f"--results: none given and none in {RESULTS}; run python -m benchmarks --out first.")
        write_text(options.page, page({path.stem: load_published(path, SECTIONS, parser.prog) for path in paths}))
        return 0
    sections = chosen("--only", options.only, {section.name: section for section in SECTIONS})
    measure(options.out, sections, sizes_for(options.quick, options.seed, options.rounds), options.quick)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Inference against the truth: `python -m theory_checks.inference --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. `python -m
theory_checks.inference --page docs/inference_benchmark.md` writes the page from the committed result alone. Exit status
0 when all was measured, whatever the figures; 2 for bad input.
"""

from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.result_file import ROOT, command_line, measure
from benchmarks.result_tables import chosen, load_published, markdown
from models import cli
from prob_transformer.files import write_text
from theory_checks.inference import SECTIONS
from theory_checks.inference.inferred_models import sizes_for

RESULT = ROOT / "results" / "reference" / "inference.json"
INTRODUCTION = """# Inference against the truth

Every number on this page comes from the result committed as
[inference.json](../results/reference/inference.json); `python -m theory_checks.inference --page
docs/inference_benchmark.md` writes the page, and a test compares them. `python -m theory_checks.inference --out FILE`
measures again. How the methods are used: [inference.md](inference.md). The character GPT next to laplace-torch:
[laplace_torch.md](laplace_torch.md)."""


def page(result: dict[str, Any]) -> str:
    """The text of the page from a result."""
    return f"{INTRODUCTION}\n\n{markdown(result, SECTIONS)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    parser = command_line("python -m theory_checks.inference", "Inference against the truth.")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        raise ValueError(f"--seed: got {options.seed}; pass an integer of at least 0.")
    if options.page:
        (result,) = options.results or (RESULT,)
        write_text(options.page, page(load_published(result, SECTIONS, parser.prog)))
        return 0
    sections = chosen("--only", options.only, {section.name: section for section in SECTIONS})
    jax.config.update("jax_enable_x64", True)
    measure(options.out, sections, sizes_for(options.quick, options.seed), options.quick)
    return 0


if __name__ == "__main__":
    cli.run(main)

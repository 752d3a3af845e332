"""Inference against the truth: `python -m theory_checks.inference --out FILE [--quick] [--only NAME ...]`.

A killed run keeps its finished sections in FILE.partial, and the same command goes on from there. `python -m
theory_checks.inference --page docs/inference_benchmark.md` writes the page from the committed result alone. Exit status
0 when all was measured, whatever the figures; 2 for bad input.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.result_file import ROOT, measure_or_publish
from benchmarks.result_tables import markdown
from models import cli
from theory_checks.inference import SECTIONS
from theory_checks.inference.inferred_models import sizes_for

RESULT = ROOT / "results" / "reference" / "inference.json"
INTRODUCTION = """# Inference against the truth

Every number on this page comes from the result committed as
[inference.json](../results/reference/inference.json); `python -m theory_checks.inference --page
docs/inference_benchmark.md` writes the page, and a test compares them. `python -m theory_checks.inference --out FILE`
measures again; version 0.1, whose result this is, called it `python -m benchmarks.inference`. How the methods are used:
[inference.md](inference.md). The character GPT next to laplace-torch: [laplace_torch.md](laplace_torch.md)."""


def page(result: dict[str, Any]) -> str:
    """The text of the page from a result."""
    return f"{INTRODUCTION}\n\n{markdown(result, SECTIONS)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    return measure_or_publish(
        arguments, "python -m theory_checks.inference", "Inference against the truth.", SECTIONS, sizes_for, RESULT,
        lambda path, result: page(result),
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)

"""`python -m benchmarks.inference.page`: docs/inference_benchmark.md, written from the committed results alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.inference.registry import SECTIONS
from benchmarks.laplace_torch import page as laplace_torch
from benchmarks.page import load as load_result
from benchmarks.result import ROOT
from benchmarks.table import markdown
from models import cli
from prob_transformer.files import write_text

RESULT = ROOT / "benchmarks" / "inference" / "result.json"
PAGE = ROOT / "docs" / "inference_benchmark.md"
INTRODUCTION = """# Inference against the truth

Every number on this page comes from the results committed as
[inference/result.json](../benchmarks/inference/result.json) and
[laplace_torch/result.json](../benchmarks/laplace_torch/result.json); `python -m benchmarks.inference.page` writes the
page, and a test compares them. `python -m benchmarks.inference --out FILE` and `make benchmark-laplace` measure again.
How the methods are used: [inference.md](inference.md)."""


def load(path: Path) -> dict[str, Any]:
    """A result fit to be published. Raises ValueError naming the file for one that is not."""
    return load_result(path, SECTIONS, "python -m benchmarks.inference")


def page(result: dict[str, Any], beside: dict[str, Any]) -> str:
    """The text of the page from the result of this benchmark and that of the comparison with laplace-torch."""
    return f"{INTRODUCTION}\n\n{markdown(result, known=SECTIONS)}\n\n{laplace_torch.markdown(beside)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference.page", description="Write the page.")
    parser.add_argument("--result", type=Path, default=RESULT, metavar="FILE", help="default: the committed one")
    parser.add_argument("--laplace-torch", type=Path, default=laplace_torch.RESULT, metavar="FILE", help="likewise")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="page to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    beside = laplace_torch.load(options.laplace_torch)
    write_text(options.page, page(load(options.result), beside))
    print(f"page: {options.page}")


if __name__ == "__main__":
    cli.run(main)

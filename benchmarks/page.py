"""`python -m benchmarks.page [RESULT.json ...] [--page FILE]`: the page of the benchmarks, written from results alone.

Without results it takes all that are committed, benchmarks/results/*.json. Quick or incomplete ones are refused.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import SECTIONS
from benchmarks.result import ROOT
from benchmarks.section import Section
from benchmarks.table import markdown
from models import cli
from prob_transformer.files import write_text

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Every number on this page comes from a result committed under [benchmarks/results](../benchmarks/results);
`python -m benchmarks.page` writes the page, and a test compares the two. `make benchmark` measures again, on your
machine.

In every round each contestant is timed once, right after an untimed run of its own, in an order rotated from round to
round, and ratios are taken within rounds. Nothing here was measured on an accelerator unless its heading says so."""


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """The text of the page from results by name, in the order of their names."""
    parts = [INTRODUCTION]
    for name in sorted(results):
        parts.append(f"## {name}\n\n{markdown(results[name], level=3)}")
    return "\n\n".join(parts) + "\n"


def load(path: Path, sections: Sequence[Section] = SECTIONS, command: str = "python -m benchmarks") -> dict[str, Any]:
    """A result of `command` fit to be published. Raises ValueError naming the file for one that is not."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        quick, found = result["provenance"]["configuration"]["quick"], result["sections"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"RESULT: {path} is not a result; write one with {command} --out {path}.") from None
    missing = [section.name for section in sections if section.name not in found]
    if quick or missing:
        what = "is a quick run" if quick else f"lacks {', '.join(missing)}"
        raise ValueError(f"RESULT: {path} {what}; pass the result of a whole run, without --quick and --only.")
    return result


def committed(folder: Path = RESULTS) -> list[Path]:
    return sorted(folder.glob("*.json"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Write the page of the benchmarks.")
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULT.json", help="default: all committed ones")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="page to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    paths = options.results or committed()
    if not paths:
        raise ValueError(f"RESULT: none given and none in {RESULTS}; run python -m benchmarks --out RESULT.json first.")
    write_text(options.page, page({path.stem: load(path) for path in paths}))
    print(f"page: {options.page}")


if __name__ == "__main__":
    cli.run(main)

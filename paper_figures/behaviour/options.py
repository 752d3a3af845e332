"""The options that both commands of this folder have, their checks, and what a result records of them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prob_transformer._validation import require_count

# By name: default, smallest value, meaning.
Counts = Mapping[str, tuple[int, int, str]]
_WIKIPEDIA = "validation articles of the Wikipedia sample"


def parsed(
    program: str, description: str, positive: tuple[str, float, str], counts: Counts, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The options of a command with one positive number (name, default, meaning) and counts. ValueError for bad ones."""
    name, default, meaning = positive
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--text", type=Path, help=f"UTF-8 text (default: {_WIKIPEDIA})")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} (default: %(default)s)")
    for count, (usual, _, purpose) in counts.items():
        parser.add_argument(f"--{count}", type=int, default=usual, help=f"{purpose} (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for count, (_, smallest, purpose) in counts.items():
        require_count(f"--{count}", getattr(arguments, count), smallest, purpose)
    if not 0 < getattr(arguments, name) < np.inf:
        raise ValueError(f"--{name}: got {getattr(arguments, name)}; pass a number above 0.")
    return arguments


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on: the options, with the text by its name."""
    source = _WIKIPEDIA if arguments.text is None else arguments.text.name
    return {name: value for name, value in vars(arguments).items() if name not in ("text", "out")} | {"text": source}

"""The saved result of `python -m benchmarks.inference`, for the figures and the report."""

from pathlib import Path
from typing import Any

from paper_figures.saved_results import load_record

INFERENCE = Path(__file__).resolve().parent.parent / "benchmarks" / "inference" / "result.json"


def load_inference(path: Path) -> dict[str, Any]:
    """The sections by name. Raises ValueError naming the command to run if there is no result."""
    return load_record(path, ("sections",), "--inference: no result", "python -m benchmarks.inference --out")[
        "sections"
    ]

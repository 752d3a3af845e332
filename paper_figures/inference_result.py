"""The saved result of `python -m theory_checks.inference`, for the figures and the report."""

from pathlib import Path
from typing import Any

from paper_figures.saved import load_record

INFERENCE = Path(__file__).resolve().parent.parent / "results" / "reference" / "inference.json"


def load_inference(path: Path) -> dict[str, Any]:
    """The sections by name. Raises ValueError naming the command to run if there is no result."""
    return load_record(path, ("sections",), "--inference: no result", "python -m theory_checks.inference --out")[
        "sections"
    ]

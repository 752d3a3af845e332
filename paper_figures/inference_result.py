"""The saved result of `python -m benchmarks.inference`, for the figures and the report."""

import json
from pathlib import Path
from typing import Any

INFERENCE = Path(__file__).resolve().parent.parent / "benchmarks" / "inference" / "result.json"


def load_inference(path: Path) -> dict[str, Any]:
    """The sections by name. Raises ValueError naming the command to run if there is no result."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["sections"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--inference: no result at {path} ({error}); run python -m benchmarks.inference --out {path}."
        ) from None

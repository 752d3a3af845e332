"""The saved results of `python -m theory_checks`, for the figures and the report."""

import json
from pathlib import Path
from typing import Any


def load_checks(path: Path) -> dict[str, Any]:
    """The checks with their provenance. Raises ValueError naming the command to run if there are none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["checks"], record["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--checks: no checks at {path}; run python -m theory_checks --json {path}.") from None
    return record

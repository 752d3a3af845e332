"""Saved results as JSON, for the figures and the report."""

import json
from pathlib import Path
from typing import Any


def load_record(path: Path, keys: tuple[str, ...], lacking: str, command: str) -> dict[str, Any]:
    """The object in a file, holding at least `keys`. Raises ValueError: what is lacking, where, and the command for it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            record[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{lacking} at {path} ({error}); run {command} {path}.") from None
    return record


def load_checks(path: Path, option: str = "--checks") -> dict[str, Any]:
    """The saved results of `python -m theory_checks` with their provenance. Raises ValueError naming the option."""
    return load_record(path, ("checks", "provenance"), f"{option}: no checks", "python -m theory_checks --json")

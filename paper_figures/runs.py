"""Saved results of a sweep, as the figures and the report read them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.char_gpt.config import method_of
from models.char_gpt.run import MARGINS
from models.char_gpt.sweep import METHODS


class Runs(NamedTuple):
    """A sweep: its summary file, the runs of each method by seed, and the folder they lie in."""

    folder: Path
    summary: dict[str, Any]
    by_method: dict[str, list[dict[str, Any]]]

    def margins(self, method: str, site: str) -> np.ndarray:
        """Signed determinant margins at a site, all seeds of a method together, flat."""
        parts = []
        for run in self.by_method[method]:
            with np.load(self.folder / run["run"] / MARGINS) as saved:
                parts.append(saved[site].ravel())
        return np.concatenate(parts)


METHOD_NAMES = tuple(method_of(method.objective, method.site) for method in METHODS)


def load_runs(folder: Path) -> Runs:
    """The sweep under `folder`. Raises ValueError with the command that makes it if there is none."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"--runs: no readable sweep at {path}; make one with python -m models.char_gpt sweep --out {folder}."
        ) from None
    by_method: dict[str, list[dict[str, Any]]] = {}
    for name in METHOD_NAMES:
        members = [run for run in summary["runs"] if run["method"] == name]
        if members:
            by_method[name] = members
    return Runs(folder, summary, by_method)


def seed_of(run: dict[str, Any]) -> int:
    return int(run["provenance"]["seed"])


def weight_of(run: dict[str, Any]) -> float:
    return float(run["provenance"]["configuration"]["barrier_weight"])


def noise_rows(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in run["noise"] if row["kind"] == kind]

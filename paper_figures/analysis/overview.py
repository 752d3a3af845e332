"""Every method at its strength, and at one clean cost, next to plain cross-entropy; nothing is tested here."""

from typing import Any

import numpy as np

from paper_figures.analysis.comparisons import MARGINS_SPLIT, PERTURBATIONS
from paper_figures.analysis.equal_cost import at_equal_cost
from paper_figures.analysis.paired import Paired
from paper_figures.analysis.selection import Selection
from paper_figures.runs import BASELINE, Run, Runs, clean_loss, increase


def described(selections: dict[str, Selection], split: str) -> list[dict[str, Any]]:
    """A row a method on a split: losses in nats per character, changes in per cent of the mean of ce, paired by seed."""
    baseline = selections[BASELINE].runs
    return [_row(selection, baseline, split) for selection in selections.values()]


def _row(selection: Selection, baseline: list[Run], split: str) -> dict[str, Any]:
    clean = [clean_loss(run, split) for run in selection.runs]
    reference = [clean_loss(run, split) for run in baseline]
    perturbations = []
    for kind, level in PERTURBATIONS:
        own = [increase(run, split, kind, level) for run in selection.runs]
        plain = [increase(run, split, kind, level) for run in baseline]
        perturbations.append({"kind": kind, "level": level, "increase": float(np.mean(own)), **change(own, plain)})
    return {
        "method": selection.method,
        "split": split,
        "strength": selection.strength,
        "within_budget": selection.within_budget,
        "validation_cost_percent": 100 * selection.cost,
        "clean_loss": float(np.mean(clean)),
        **change(clean, reference),
        "perturbations": perturbations,
        "embedding_rms": float(np.mean([run["embedding_rms"] for run in selection.runs])),
        "margins_split": MARGINS_SPLIT,
        "negative_share": float(np.mean([run["margins"]["layers"]["negative_share"] for run in selection.runs])),
    }


def at_one_cost(runs: Runs, split: str) -> list[dict[str, Any]]:
    """A row a method at the declared clean cost: between which strengths, the increase there and its change from that of ce."""
    kind, level = PERTURBATIONS[0]
    plain = [increase(run, split, kind, level) for run in runs.baseline]
    found: list[dict[str, Any]] = []
    for method in runs.methods:
        priced = at_equal_cost(runs, method)
        row = {"method": method, "split": split}
        if isinstance(priced, str):
            found.append({**row, "reason": priced})
            continue
        own = priced.increases(split, kind, level).tolist()
        between = {"strengths": list(priced.strengths), "costs": list(priced.costs)}
        found.append({**row, **between, "increase": float(np.mean(own)), **change(own, plain)})
    return [row for row in found if row["method"] != BASELINE]


def change(own: list[float], reference: list[float]) -> dict[str, Any]:
    """Mean change in per cent of the mean of the reference, with its 95 % interval of the t distribution.

    Both are None where the mean of the reference is not positive; the interval is None for one seed.
    """
    mean = float(np.mean(reference))
    if mean <= 0:
        return {"change_percent": None, "change_interval": None}
    paired = Paired.of(100 * (np.array(own) - np.array(reference)) / mean)
    return {
        "change_percent": paired.mean,
        "change_interval": None if paired.t_interval is None else list(paired.t_interval),
    }

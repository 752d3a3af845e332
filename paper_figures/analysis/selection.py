"""The strength of a method, chosen on clean validation loss alone: the largest that costs at most 1 %.

The cost is the mean over seeds of the clean validation loss against that of plain cross-entropy with the same seeds. No
perturbation is looked at. If every strength costs more, it is the one of lowest loss, marked as over the budget.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from paper_figures.runs import Run, Runs, clean_loss

BUDGET = 0.01


class Selection(NamedTuple):
    """A method's strength, its cost in clean validation loss as a share, and whether that is within the budget."""

    method: str
    strength: float
    cost: float
    within_budget: bool
    runs: list[Run]


def select(runs: Runs, method: str) -> Selection | None:
    """The strength chosen for a method; None if every strength diverged on some seed."""
    costs = {
        strength: cost for strength in runs.strengths(method) if (cost := cost_of(runs, method, strength)) is not None
    }
    if not costs:
        return None
    affordable = [strength for strength, cost in costs.items() if cost <= BUDGET]
    # Equal losses: the weaker one, which changes training less.
    chosen = max(affordable) if affordable else min(costs, key=lambda strength: (costs[strength], strength))
    return Selection(method, chosen, costs[chosen], bool(affordable), runs.finished(method, chosen))


def cost_of(runs: Runs, method: str, strength: float, split: str = "validation") -> float | None:
    """Mean clean loss of a method over that of plain cross-entropy, less 1; None if a run of it diverged."""
    members = runs.finished(method, strength)
    if not members:
        return None
    return _mean_clean(members, split) / _mean_clean(runs.baseline, split) - 1


def select_all(runs: Runs) -> dict[str, Selection]:
    """The selections by method, without methods that diverged at every strength."""
    found = {method: select(runs, method) for method in runs.methods}
    return {method: selection for method, selection in found.items() if selection is not None}


def selected(runs: Runs, methods: Iterable[str]) -> list[Selection]:
    """Those of the methods that are in the sweep and have a strength, in the order given."""
    found = select_all(runs)
    return [found[method] for method in methods if method in found]


def _mean_clean(members: list[Run], split: str) -> float:
    return float(np.mean([clean_loss(run, split) for run in members]))

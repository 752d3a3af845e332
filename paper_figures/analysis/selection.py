"""The strength of a method, chosen on clean validation loss alone: the largest that costs at most 0.5 %.

The cost is the mean over seeds of the clean validation loss against that of plain cross-entropy with the same seeds. No
perturbation is looked at. If every strength costs more, it is the one of lowest loss, marked as over the budget. The budget is
half of the 1 % that a clean loss may cost in `comparisons`: where both are the same, the selection has already decided most
of the test, because validation and test costs of a model differ little.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from paper_figures.runs import Run, Runs, clean_loss

BUDGET = 0.005
# That of the first version of the study, whose verdicts are still given beside.
FIRST_BUDGET = 0.01


class Selection(NamedTuple):
    """A method's strength, its cost in clean validation loss as a share, and whether that is within the budget."""

    method: str
    strength: float
    cost: float
    within_budget: bool
    runs: list[Run]


def select(runs: Runs, method: str, budget: float = BUDGET) -> Selection | None:
    """The strength chosen for a method; None if every strength diverged on some seed."""
    costs = costs_of(runs, method)
    if not costs:
        return None
    affordable = [strength for strength, cost in costs.items() if cost <= budget]
    # Equal losses: the weaker one, which changes training less.
    chosen = max(affordable) if affordable else min(costs, key=lambda strength: (costs[strength], strength))
    return Selection(method, chosen, costs[chosen], bool(affordable), runs.finished(method, chosen))


def costs_of(runs: Runs, method: str, split: str = "validation") -> dict[float, float]:
    """Mean clean loss over that of plain cross-entropy, less 1, by strength; without strengths that diverged."""
    reference = _mean_clean(runs.baseline, split)
    finished = {strength: runs.finished(method, strength) for strength in runs.strengths(method)}
    return {strength: _mean_clean(members, split) / reference - 1 for strength, members in finished.items() if members}


def select_all(runs: Runs, budget: float = BUDGET) -> dict[str, Selection]:
    """The selections by method, without methods that diverged at every strength."""
    found = {method: select(runs, method, budget) for method in runs.methods}
    return {method: selection for method, selection in found.items() if selection is not None}


def selected(runs: Runs, methods: Iterable[str]) -> list[Selection]:
    """Those of the methods that are in the sweep and have a strength, in the order given."""
    found = select_all(runs)
    return [found[method] for method in methods if method in found]


def _mean_clean(members: list[Run], split: str) -> float:
    return float(np.mean([clean_loss(run, split) for run in members]))

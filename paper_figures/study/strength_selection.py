"""The strength of a method, chosen on clean validation loss alone; and methods at one declared clean cost.

The cost of a strength is the mean over seeds of the clean validation loss against that of plain cross-entropy with the
same seeds. No perturbation is looked at.

Chosen is the largest strength that costs at most the budget of 0.5 %; if every strength costs more, the one of lowest
loss, marked as over the budget. The budget is half of the 1 % that a clean loss may cost in `comparisons`: where both are
the same, the selection has already decided most of the test, because validation and test costs of a model differ little.

At one cost, methods are compared between the strengths that were trained. With c_0 = 0 at plain cross-entropy and c_k the
cost of the k-th strength, the two strengths are the first neighbours with c_k < c <= c_(k+1) for the declared cost c, from
weak to strong. Everything of a seed is interpolated linearly with the same weight:

    y(seed) = (1 - w) y_k(seed) + w y_(k+1)(seed),    w = (c - c_k) / (c_(k+1) - c_k)

So the mean cost is exactly c, pairs of a seed stay pairs, and no strength is chosen by what a perturbation does. The weights
are taken as known: an interval over seeds does not hold what is uncertain in them, nor that a curve may bend in between. Where
the costs of the two strengths lie further apart than 1 %, the line is described and nothing is tested on it.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from paper_figures.study.runs import Run, Runs, clean_loss, increase

BUDGET = 0.005
# That of the first version of the study, whose verdicts are still given beside.
FIRST_BUDGET = 0.01
COST = 0.005
WIDEST_GAP = 0.01


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
    reference = float(clean_losses(runs.baseline, split).mean())
    finished = {strength: runs.finished(method, strength) for strength in runs.strengths(method)}
    return {
        strength: float(clean_losses(members, split).mean()) / reference - 1
        for strength, members in finished.items()
        if members
    }


def select_all(runs: Runs, budget: float = BUDGET) -> dict[str, Selection]:
    """The selections by method, without methods that diverged at every strength."""
    found = {method: select(runs, method, budget) for method in runs.methods}
    return {method: selection for method, selection in found.items() if selection is not None}


def selected(runs: Runs, methods: Iterable[str]) -> list[Selection]:
    """Those of the methods that are in the sweep and have a strength, in the order given."""
    found = select_all(runs)
    return [found[method] for method in methods if method in found]


def clean_losses(members: list[Run], split: str) -> Float[np.ndarray, " n"]:
    """Nats per character without a perturbation, by seed."""
    return np.array([clean_loss(run, split) for run in members])


def increases(members: list[Run], split: str, kind: str, level: float) -> Float[np.ndarray, " n"]:
    """By how many nats per character a perturbation raises the loss, by seed."""
    return np.array([increase(run, split, kind, level) for run in members])


class EqualCost(NamedTuple):
    """The two neighbouring strengths (0 is plain cross-entropy), their costs as shares, and the weight of the second."""

    method: str
    strengths: tuple[float, float]
    costs: tuple[float, float]
    weight: float
    runs: tuple[list[Run], list[Run]]

    @property
    def gap(self) -> str:
        """Why the line is too long to be tested, as the end of a sentence that begins with the method; else nothing."""
        apart = self.costs[1] - self.costs[0]
        if apart <= WIDEST_GAP:
            return ""
        return f"is interpolated between strengths whose clean costs lie {100 * apart:.2f} % apart"

    def increases(self, split: str, kind: str, level: float) -> Float[np.ndarray, " n"]:
        """The interpolated increase of the loss under a perturbation, by seed."""
        lower, upper = (increases(members, split, kind, level) for members in self.runs)
        return (1 - self.weight) * lower + self.weight * upper


def at_equal_cost(runs: Runs, method: str, cost: float = COST) -> EqualCost | str:
    """The method at that clean cost; else why it has none, as the end of a sentence that begins with its name."""
    costs = {0.0: 0.0, **costs_of(runs, method)}
    for (weak, below), (strong, above) in pairwise(costs.items()):
        if below < cost <= above:
            lower, upper = (runs.baseline if s == 0 else runs.finished(method, s) for s in (weak, strong))
            return EqualCost(method, (weak, strong), (below, above), (cost - below) / (above - below), (lower, upper))
    return f"never reaches a clean cost of {100 * cost:g} % (at most {100 * max(costs.values()):+z.2f} %)"

"""Methods at one declared clean cost, between the strengths that were trained.

With c_0 = 0 at plain cross-entropy and c_k the mean cost of the k-th strength in clean validation loss, the two strengths are
the first neighbours with c_k < c <= c_(k+1) for the declared cost c, from weak to strong. Everything of a seed is interpolated
linearly with the same weight:

    y(seed) = (1 - w) y_k(seed) + w y_(k+1)(seed),    w = (c - c_k) / (c_(k+1) - c_k)

So the mean cost is exactly c, pairs of a seed stay pairs, and no strength is chosen by what a perturbation does. The weights
are taken as known: an interval over seeds does not hold what is uncertain in them, nor that a curve may bend in between. Where
the costs of the two strengths lie further apart than 1 %, the line is described and nothing is tested on it.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from paper_figures.analysis.selection import costs_of
from paper_figures.runs import Run, Runs, increase

COST = 0.005
WIDEST_GAP = 0.01


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
        lower, upper = (np.array([increase(run, split, kind, level) for run in members]) for members in self.runs)
        return (1 - self.weight) * lower + self.weight * upper


def at_equal_cost(runs: Runs, method: str, cost: float = COST) -> EqualCost | str:
    """The method at that clean cost; else why it has none, as the end of a sentence that begins with its name."""
    costs = {0.0: 0.0, **costs_of(runs, method)}
    for (weak, below), (strong, above) in pairwise(costs.items()):
        if below < cost <= above:
            lower, upper = (runs.baseline if s == 0 else runs.finished(method, s) for s in (weak, strong))
            return EqualCost(method, (weak, strong), (below, above), (cost - below) / (above - below), (lower, upper))
    return f"never reaches a clean cost of {100 * cost:g} % (at most {100 * max(costs.values()):+z.2f} %)"

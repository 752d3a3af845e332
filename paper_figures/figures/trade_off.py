"""Clean loss against robustness for every method and strength: who buys more robustness for the same price?"""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, METHOD_STYLES, signed_ticks
from paper_figures.study.comparisons import PERTURBATIONS
from paper_figures.study.design import BASELINE
from paper_figures.study.runs import Runs, increase, load_runs
from paper_figures.study.strength_selection import BUDGET, costs_of, select

NAME = "trade_off"
SOURCE = "runs"
CAPTION = (
    "What robustness costs, on test text: loss increase under noise as large as the embeddings (standard deviation 1.0 times "
    "their RMS) against clean loss, both as changes from plain cross-entropy, means over seeds. A line joins the strengths of "
    "a method, from plain cross-entropy (the origin) on; rings: the strengths chosen on clean validation loss. Down and to the left is better. "
    "Dotted: the budget of 0.5 % and no change. Both axes are linear near 0 (1 % and 10 %) and logarithmic beyond."
)

_CLEAN_TICKS = (-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50)
_INCREASE_TICKS = (-80, -40, -20, -10, -5, 0, 5, 10, 20, 40, 80, 160)


def draw(runs: Path) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    sweep = load_runs(runs)
    figure, panel = plt.subplots(figsize=(7.2, 5.2))
    for method in sweep.methods:
        points = [(0.0, 0.0)] if method == BASELINE else [(0.0, 0.0), *_points(sweep, method).values()]
        panel.plot(*zip(*points, strict=True), label=method, linewidth=1.1, **_marks(method))
        chosen = select(sweep, method)
        if chosen is not None and method != BASELINE:
            panel.plot(*_points(sweep, method)[chosen.strength], "o", markersize=12, fillstyle="none", color=BLACK)
    panel.axvline(100 * BUDGET, color=BLACK, linestyle=":", linewidth=1.0)
    panel.axhline(0.0, color=BLACK, linestyle=":", linewidth=1.0)
    panel.set_xscale("symlog", linthresh=1.0)
    panel.set_yscale("symlog", linthresh=10.0)
    panel.margins(0.06)
    signed_ticks(panel.xaxis, _CLEAN_TICKS)
    signed_ticks(panel.yaxis, _INCREASE_TICKS)
    panel.set_xlabel("change of clean test loss against ce (%)")
    kind, level = PERTURBATIONS[0]
    panel.set_ylabel(f"change of loss increase under {kind} {level:g} (%)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _marks(method: str) -> dict:
    return {**METHOD_STYLES[method], "markevery": slice(0 if method == BASELINE else 1, None)}


def _points(sweep: Runs, method: str) -> dict[float, tuple[float, float]]:
    """Change of clean loss and of the increase, in per cent, by strength; without those that diverged."""
    kind, level = PERTURBATIONS[0]
    reference = np.mean([increase(run, "test", kind, level) for run in sweep.baseline])
    found = {}
    for strength, cost in costs_of(sweep, method, "test").items():
        raised = np.mean([increase(run, "test", kind, level) for run in sweep.finished(method, strength)])
        found[strength] = (100 * cost, float(100 * (raised / reference - 1)))
    return found

"""Clean loss against robustness for every method and strength: who buys more robustness for the same price?"""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, DOTTED, METHOD_STYLES, signed_ticks
from paper_figures.study.comparisons import PERTURBATIONS
from paper_figures.study.design import BASELINE
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import BUDGET, costs_of, increases, select

CAPTION = (
    "What robustness costs, on test text: loss increase under noise as large as the embeddings (standard deviation 1.0 times "
    "their RMS) against clean loss, both as changes from plain cross-entropy, means over seeds. A line joins the strengths of "
    "a method, from plain cross-entropy (the origin) on; rings: the strengths chosen on clean validation loss. Down and to the left is better. "
    f"Dotted: the budget of {100 * BUDGET:g} % and no change. Both axes are linear near 0 (1 % and 10 %) and logarithmic beyond."
)

_CLEAN_TICKS = (-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50)
_INCREASE_TICKS = (-80, -40, -20, -10, -5, 0, 5, 10, 20, 40, 80, 160)


def draw(sweep: Runs) -> Figure:
    figure, panel = plt.subplots(figsize=(7.2, 5.2))
    for method in sweep.methods:
        plain = method == BASELINE
        points = {} if plain else _points(sweep, method)
        line = zip((0.0, 0.0), *points.values(), strict=True)
        # The origin, where the lines meet, is marked once.
        panel.plot(*line, label=method, linewidth=1.1, markevery=slice(int(not plain), None), **METHOD_STYLES[method])
        chosen = None if plain else select(sweep, method)
        if chosen is not None:
            panel.plot(*points[chosen.strength], "o", markersize=12, fillstyle="none", color=BLACK)
    panel.axvline(100 * BUDGET, **DOTTED)
    panel.axhline(0.0, **DOTTED)
    panel.set_xscale("symlog", linthresh=1.0)
    panel.set_yscale("symlog", linthresh=10.0)
    panel.margins(0.06)
    signed_ticks(panel.xaxis, _CLEAN_TICKS)
    signed_ticks(panel.yaxis, _INCREASE_TICKS)
    under = "change of loss increase under {} {:g} (%)".format(*PERTURBATIONS[0])
    panel.set(xlabel="change of clean test loss against ce (%)", ylabel=under)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _points(sweep: Runs, method: str) -> dict[float, tuple[float, float]]:
    """Change of clean loss and of the increase, in per cent, by strength; without those that diverged."""
    plain = increases(sweep.baseline, "test", *PERTURBATIONS[0]).mean()
    return {
        strength: (
            100 * cost,
            100 * (increases(sweep.finished(method, strength), "test", *PERTURBATIONS[0]).mean() / plain - 1),
        )
        for strength, cost in costs_of(sweep, method, "test").items()
    }

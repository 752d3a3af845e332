"""Clean loss against the strength of every method, with the budget and the strength that the rule chose."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, DOTTED, METHOD_STYLES, panel_grid, signed_ticks
from paper_figures.study.design import BASELINE
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import BUDGET, clean_losses, select

CAPTION = (
    "Clean validation loss against the strength of each method (lambda for the barriers), as a change from plain "
    f"cross-entropy of the same seeds; small points are seeds, the line is their mean. Dotted: the budget of {100 * BUDGET:g} %. Ring: the "
    "strength chosen, the largest whose mean keeps the budget. A strength without a point diverged on some seed. The axis "
    "is linear within 1 % and logarithmic beyond."
)


def draw(sweep: Runs) -> Figure:
    methods = [method for method in sweep.methods if method != BASELINE]
    figure, panels = panel_grid(len(methods), 4, 1.9, "change of clean loss (%)", sharey=True)
    for panel, method in zip(panels, methods, strict=True):
        _panel(panel, sweep, method)
    return figure


def _panel(panel: Axes, sweep: Runs, method: str) -> None:
    reference = clean_losses(sweep.baseline, "validation")
    means, strengths = {}, sweep.strengths(method)
    for strength in strengths:
        losses = clean_losses(sweep.finished(method, strength), "validation")
        if len(losses):
            means[strength] = 100 * (losses.mean() / reference.mean() - 1)
            changes = 100 * (losses / reference - 1)
            panel.plot([strength] * len(changes), changes, ".", color="#999999", markersize=3, zorder=1)
    panel.plot(list(means), list(means.values()), **METHOD_STYLES[method])
    chosen = select(sweep, method)
    if chosen is not None:
        panel.plot(chosen.strength, means[chosen.strength], "o", markersize=11, fillstyle="none", color=BLACK)
    panel.axhline(100 * BUDGET, **DOTTED)
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=1.0)
    signed_ticks(panel.yaxis, (-10, -1, 0, 1, 10, 100))
    panel.set(xlim=(strengths[0] / 2, strengths[-1] * 2), title=method, xlabel="strength")

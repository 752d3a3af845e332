"""Distribution of det J in every layer over training, for plain cross-entropy and the barriers on the layers."""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import DOTTED, METHOD_STYLES, signed_ticks, watched
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import Selection, selected

# Shown where they were run; the barriers on the embedding stage leave the layers much as they are.
METHODS = ("ce", "margin@layers", "one-sided@layers")
# Places in the list of quantiles 0.01, 0.05, 0.25, 0.5, 0.75, 0.95 that a sweep saves.
_LOWEST, _OUTER, _INNER, _MEDIAN = 0, (1, 5), (2, 4), 3
CAPTION = (
    "Determinant margins det J_i of every head of a layer while a model trains, on the training windows of the step: median "
    "(line), the middle half (dark band), from the 5 % to the 95 % quantile (light band) and the 1 % quantile (dashed), mean over seeds, each method at its "
    "strength. Dotted: the degeneracy boundary. The axis is linear within 1 of it and logarithmic beyond."
)

_TICKS = (-100, -10, -1, 0, 1, 10, 100, 1000)


def draw(sweep: Runs) -> Figure:
    shown = selected(sweep, METHODS)
    layers = len(shown[0].runs[0]["watch"][0]["layers"])
    figure, panels = plt.subplots(
        layers, len(shown), figsize=(7.2, 2.1 * layers + 0.3), sharex=True, sharey=True, squeeze=False
    )
    for layer, row in enumerate(panels):
        for panel, selection in zip(row, shown, strict=True):
            _panel(panel, selection, layer)
            panel.set(title=f"{selection.method}, layer {layer + 1}", xlabel="training step")
        row[0].set_ylabel("det J_i (dimensionless)")
        signed_ticks(row[0].yaxis, _TICKS)
    return figure


def _panel(panel: Axes, selection: Selection, layer: int) -> None:
    # Where a quantile is past the largest number the sweep has null, and nothing is drawn.
    steps, seen = watched(selection, layer, "quantiles")
    quantiles = seen.mean(axis=0).T
    color = METHOD_STYLES[selection.method]["color"]
    for (low, high), alpha in ((_OUTER, 0.2), (_INNER, 0.35)):
        panel.fill_between(steps, quantiles[low], quantiles[high], color=color, alpha=alpha, linewidth=0)
    panel.plot(steps, quantiles[_MEDIAN], color=color)
    panel.plot(steps, quantiles[_LOWEST], color=color, linestyle="--", linewidth=1.0)
    panel.axhline(0.0, **DOTTED)
    panel.set_yscale("symlog", linthresh=1.0)

"""Barrier and smallest margin of every layer over training."""

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import DOTTED, legend_below, line_style, signed_ticks, watched
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import selected

METHODS = ("ce", "margin@layers", "map@layers", "one-sided@layers")
_ROWS = (("barrier", "mean b_i = -log|det J_i| (nats)"), ("smallest", "smallest det J_i (dimensionless)"))
CAPTION = (
    "The two-sided barrier (above; positive where positions are near the boundary, far below 0 where they have been pushed "
    "away from it) and the smallest determinant margin (below) of every head of a layer while a model trains, on the training "
    "windows of the step: mean over seeds, thin lines single seeds, each method at its strength. Below the dotted line a "
    "position has crossed the boundary. Below, the axis is linear within 1 of it and logarithmic beyond."
)


def draw(sweep: Runs) -> Figure:
    shown = selected(sweep, METHODS)
    layers = len(shown[0].runs[0]["watch"][0]["layers"])
    figure, panels = plt.subplots(2, layers, figsize=(7.2, 4.8), sharex=True, sharey="row", squeeze=False)
    for row, (quantity, label) in zip(panels, _ROWS, strict=True):
        for layer, panel in enumerate(row):
            for selection in shown:
                steps, values = watched(selection, layer, quantity)
                style = line_style(selection.method)
                for seed in values:
                    panel.plot(steps, seed, linewidth=0.4, alpha=0.6, **style)
                panel.plot(steps, values.mean(axis=0), label=selection.method, **style)
            panel.axhline(0.0, **DOTTED)
            panel.set(title=f"layer {layer + 1}", xlabel="training step")
            # The mean barrier spans nats only; a smallest margin may lie a hundred past the boundary.
            if quantity == "smallest":
                panel.set_yscale("symlog", linthresh=1.0)
                signed_ticks(panel.yaxis, (-10, -1, -0.5, 0, 0.5, 1, 10))
        row[0].set_ylabel(label)
    legend_below(figure, panels[0, 0], 4)
    return figure

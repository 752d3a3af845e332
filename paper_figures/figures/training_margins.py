"""Margins of every layer over training: the distribution of det J, and the barrier with the smallest margin."""

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import DOTTED, METHOD_STYLES, legend_below, line_style, signed_ticks
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import Selection, selected

# Shown where they were run; the barriers on the embedding stage leave the layers much as they are.
METHODS = ("ce", "margin@layers", "one-sided@layers")
BARRIER_METHODS = ("ce", "margin@layers", "map@layers", "one-sided@layers")
# Places in the list of quantiles 0.01, 0.05, 0.25, 0.5, 0.75, 0.95 that a sweep saves.
_LOWEST, _OUTER, _INNER, _MEDIAN = 0, (1, 5), (2, 4), 3
CAPTION = (
    "Determinant margins det J_i of every head of a layer while a model trains, on the training windows of the step: median "
    "(line), the middle half (dark band), from the 5 % to the 95 % quantile (light band) and the 1 % quantile (dashed), mean over seeds, each method at its "
    "strength. Dotted: the degeneracy boundary. The axis is linear within 1 of it and logarithmic beyond."
)
BARRIER_CAPTION = (
    "The two-sided barrier (above; positive where positions are near the boundary, far below 0 where they have been pushed "
    "away from it) and the smallest determinant margin (below) of every head of a layer while a model trains, on the training "
    "windows of the step: mean over seeds, thin lines single seeds, each method at its strength. Below the dotted line a "
    "position has crossed the boundary. Below, the axis is linear within 1 of it and logarithmic beyond."
)
_ROWS = (("barrier", "mean b_i = -log|det J_i| (nats)"), ("smallest", "smallest det J_i (dimensionless)"))

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
    quantiles, color = seen.mean(axis=0).T, METHOD_STYLES[selection.method]["color"]
    for (low, high), alpha in ((_OUTER, 0.2), (_INNER, 0.35)):
        panel.fill_between(steps, quantiles[low], quantiles[high], color=color, alpha=alpha, linewidth=0)
    panel.plot(steps, quantiles[_MEDIAN], color=color)
    panel.plot(steps, quantiles[_LOWEST], color=color, linestyle="--", linewidth=1.0)
    panel.axhline(0.0, **DOTTED)
    panel.set_yscale("symlog", linthresh=1.0)


def draw_barrier(sweep: Runs) -> Figure:
    shown = selected(sweep, BARRIER_METHODS)
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


def watched(selection: Selection, layer: int, quantity: str) -> tuple[list[int], Float[np.ndarray, "seeds looks ..."]]:
    """Steps at which a sweep looked at a layer while training, and what it saw there on every seed; null is NaN."""
    steps = [entry["step"] for entry in selection.runs[0]["watch"]]
    seen = [[entry["layers"][layer][quantity] for entry in run["watch"]] for run in selection.runs]
    return steps, np.array(seen, dtype=float)

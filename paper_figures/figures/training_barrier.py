"""Barrier and smallest margin of every layer over training."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, line_style, signed_ticks
from paper_figures.study.runs import load_runs
from paper_figures.study.strength_selection import Selection, selected

NAME = "training_barrier"
SOURCE = "runs"
METHODS = ("ce", "margin@layers", "map@layers", "one-sided@layers")
_ROWS = (("barrier", "mean b_i = -log|det J_i| (nats)"), ("smallest", "smallest det J_i (dimensionless)"))
CAPTION = (
    "The two-sided barrier (above; positive where positions are near the boundary, far below 0 where they have been pushed "
    "away from it) and the smallest determinant margin (below) of every head of a layer while a model trains, on the training "
    "windows of the step: mean over seeds, thin lines single seeds, each method at its strength. Below the dotted line a "
    "position has crossed the boundary. Below, the axis is linear within 1 of it and logarithmic beyond."
)


def draw(runs: Path) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    shown = selected(load_runs(runs), METHODS)
    layers = len(shown[0].runs[0]["watch"][0]["layers"])
    figure, panels = plt.subplots(2, layers, figsize=(7.2, 4.8), sharex=True, sharey="row", squeeze=False)
    for row, (quantity, label) in zip(panels, _ROWS, strict=True):
        for layer, panel in enumerate(row):
            for selection in shown:
                _curve(panel, selection, layer, quantity)
            panel.axhline(0.0, color=BLACK, linestyle=":", linewidth=1.0)
            panel.set_title(f"layer {layer + 1}")
            panel.set_xlabel("training step")
            # The mean barrier spans nats only; a smallest margin may lie a hundred past the boundary.
            if quantity == "smallest":
                panel.set_yscale("symlog", linthresh=1.0)
                signed_ticks(panel.yaxis, (-10, -1, -0.5, 0, 0.5, 1, 10))
        row[0].set_ylabel(label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curve(panel: Axes, selection: Selection, layer: int, quantity: str) -> None:
    steps = [entry["step"] for entry in selection.runs[0]["watch"]]
    values = np.array([[entry["layers"][layer][quantity] for entry in run["watch"]] for run in selection.runs], float)
    style = line_style(selection.method)
    for seed in values:
        panel.plot(steps, seed, linewidth=0.4, alpha=0.6, **style)
    panel.plot(steps, values.mean(axis=0), label=selection.method, **style)

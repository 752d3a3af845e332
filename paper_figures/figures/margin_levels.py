"""Determinant margins at the end of training: how many positions lie below a margin, site by site."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import line_style, signed_ticks
from paper_figures.study.design import BARRIERS, BASELINE
from paper_figures.study.runs import load_runs
from paper_figures.study.strength_selection import Selection, selected

NAME = "margin_levels"
SOURCE = "runs"
CAPTION = (
    "Share of positions whose determinant margin det J_i is at most the value on the axis, on validation windows from the "
    "third position on, mean over seeds of the quantiles; every method at its strength. First the embedding-prior stage, "
    "which plain cross-entropy leaves at its random start, then each layer's heads on its normalised inputs with identity values. Dotted: the "
    "degeneracy boundary. The axis is linear within 1 of it and logarithmic beyond. A margin far above 1 is no merit in "
    "itself: the two-sided barrier keeps rewarding distance where no wall is near."
)

# No more than fit a third of the width.
_TICKS = (-100, -1, 0, 1, 10, 100, 10000)


def draw(runs: Path) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    shown = selected(load_runs(runs), (BASELINE, *BARRIERS))
    layers = len(shown[0].runs[0]["margins"]["layers"]["determinant_levels"])
    figure, panels = plt.subplots(1, 1 + layers, figsize=(7.2, 3.4), sharey=True)
    _panel(panels[0], shown, "embedding", None)
    for layer, panel in enumerate(panels[1:]):
        _panel(panel, shown, "layers", layer)
    panels[0].set_ylabel("share of positions at or below")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panel(panel: Axes, shown: list[Selection], site: str, layer: int | None) -> None:
    for selection in shown:
        levels = mean_levels(selection, site, layer)
        panel.plot(levels, np.linspace(0, 1, len(levels)), label=selection.method, **line_style(selection.method))
    panel.axvline(0.0, color="black", linestyle=":", linewidth=1.0)
    panel.set_xscale("symlog", linthresh=1.0)
    signed_ticks(panel.xaxis, _TICKS)
    panel.set_xlabel("det J_i (dimensionless)")
    panel.set_title("embedding-prior stage" if layer is None else f"layer {layer + 1}, every head")


def mean_levels(selection: Selection, site: str, layer: int | None) -> np.ndarray:
    """Quantiles of det J, mean over seeds; NaN, which is not drawn, where one was not finite on some seed."""
    found = [run["margins"][site]["determinant_levels"] for run in selection.runs]
    chosen = found if layer is None else [levels[layer] for levels in found]
    return np.array(chosen, dtype=float).mean(axis=0)

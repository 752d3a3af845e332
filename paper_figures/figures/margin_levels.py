"""Determinant margins at the end of training: how many positions lie below a margin, site by site."""

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import DOTTED, legend_below, line_style, signed_ticks
from paper_figures.study.design import BARRIERS, BASELINE
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import Selection, selected

CAPTION = (
    "Share of positions whose determinant margin det J_i is at most the value on the axis, on validation windows from the "
    "third position on, mean over seeds of the quantiles; every method at its strength. First the embedding-prior stage, "
    "which plain cross-entropy leaves at its random start, then each layer's heads on its normalised inputs with identity values. Dotted: the "
    "degeneracy boundary. The axis is linear within 1 of it and logarithmic beyond. A margin far above 1 is no merit in "
    "itself: the two-sided barrier keeps rewarding distance where no wall is near."
)

# No more than fit a third of the width.
_TICKS = (-100, -1, 0, 1, 10, 100, 10000)


def draw(sweep: Runs) -> Figure:
    shown = selected(sweep, (BASELINE, *BARRIERS))
    found = np.array([mean_levels(selection) for selection in shown])
    figure, panels = plt.subplots(1, len(found[0]), figsize=(7.2, 3.4), sharey=True)
    for site, panel in enumerate(panels):
        for selection, levels in zip(shown, found[:, site], strict=True):
            panel.plot(levels, np.linspace(0, 1, len(levels)), label=selection.method, **line_style(selection.method))
        panel.axvline(0.0, **DOTTED)
        panel.set_xscale("symlog", linthresh=1.0)
        signed_ticks(panel.xaxis, _TICKS)
        title = f"layer {site}, every head" if site else "embedding-prior stage"
        panel.set(xlabel="det J_i (dimensionless)", title=title)
    panels[0].set_ylabel("share of positions at or below")
    legend_below(figure, panels[0], 4)
    return figure


def mean_levels(selection: Selection) -> Float[np.ndarray, "1+L q"]:
    """Quantiles of det J at the embedding-prior stage and then at every layer, mean over seeds.

    NaN, which is not drawn, where one was not finite on some seed.
    """
    margins = [run["margins"] for run in selection.runs]
    sites = [[of["embedding"]["determinant_levels"], *of["layers"]["determinant_levels"]] for of in margins]
    return np.array(sites, dtype=float).mean(axis=0)

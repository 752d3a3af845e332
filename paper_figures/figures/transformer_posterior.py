"""The posterior of functions of a small transformer's weights: NUTS next to Laplace's Gaussian, sampled and linearised."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from paper_figures.figures.style import BLACK, BLUE, ORANGE, legend_below, panel_grid

CAPTION = (
    "Marginal posteriors of attention logits, output logits and det J of a two-layer transformer with 216 free weights, "
    "on held-out texts: draws of NUTS (grey), the quantity at draws of Laplace's Gaussian of the weights (solid), and "
    "the quantity made linear in the weights at the mode (dashed; a line where its standard deviation is below a tenth "
    "of a bin). Of every quantity, the entries with the median and the largest distance between the linearised Gaussian "
    "and NUTS. Numbers: excess kurtosis of the draws of NUTS, 0 for a Gaussian, this distance, and the share of the "
    "solid histogram that lies outside the panel."
)


def draw(sections: dict[str, Any]) -> Figure:
    """Two panels a quantity."""
    rows = sections["functionals"]["marginals"]
    figure, panels = panel_grid(len(rows), 2, 1.8, "density")
    for panel, row in zip(panels, rows, strict=True):
        counts, edges = np.asarray(row["histogram"]["counts"]), np.asarray(row["histogram"]["edges"])
        widths = np.diff(edges)
        panel.stairs(counts / counts.sum() / widths, edges, fill=True, color="#bbbbbb", label="NUTS")
        panel.stairs(np.asarray(row["sampled"]) / widths, edges, color=BLUE, label="Laplace, sampled")
        mean, sd = row["laplace_mean"], row["laplace_sd"]
        dashed: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "label": "Laplace, linearised"}
        if sd < widths[0] / 10:
            panel.axvline(mean, **dashed)
        else:
            axis = np.linspace(edges[0], edges[-1], 600)
            panel.plot(axis, norm.pdf(axis, mean, sd), **dashed)
        panel.locator_params(axis="x", nbins=6)
        panel.set(title=f"{row['model']}, {row['coordinate']}", xlabel=row["model"])
        beyond = 1 - np.sum(row["sampled"])
        shown = f"NUTS: excess\nkurtosis {row['kurtosis']:.2g}\nlinearised:\ndistance {row['distance']:.2f}"
        if beyond > 0.005:
            shown += f"\nsampled:\n{beyond:.0%} outside"
        panel.text(0.02, 0.95, shown, transform=panel.transAxes, ha="left", va="top", fontsize=7, color=BLACK)
    legend_below(figure, panels[0], 3)
    return figure

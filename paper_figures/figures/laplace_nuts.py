"""Laplace's Gaussian over the draws of NUTS, coordinate by coordinate."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from paper_figures.figures.style import BLACK, ORANGE, legend_below, panel_grid

CAPTION = (
    "Marginal posteriors in unconstrained coordinates (positive parameters: their logarithm): draws of NUTS (grey) and "
    "Laplace's Gaussian at the mode (dashed). Parameters of the process from its own embeddings, on the line and in the "
    "plane, and embeddings of the scalar process given four tokens alone. Numbers: difference of the means in posterior "
    "standard deviations, and relative difference of the standard deviations."
)
_COLUMNS = 3


def draw(inference: dict[str, Any]) -> Figure:
    rows = inference["laplace-nuts"]["rows"]
    figure, panels = panel_grid(len(rows), _COLUMNS, 2.0)
    for panel, row in zip(panels, rows, strict=True):
        counts, edges = np.asarray(row["histogram"]["counts"]), np.asarray(row["histogram"]["edges"])
        panel.stairs(counts / counts.sum() / np.diff(edges), edges, fill=True, color="#bbbbbb", label="NUTS")
        mean, sd = row["laplace_mean"], row["laplace_sd"]
        axis = np.linspace(min(edges[0], mean - 3.5 * sd), max(edges[-1], mean + 3.5 * sd), 300)
        panel.plot(axis, norm.pdf(axis, mean, sd), color=ORANGE, linestyle="--", label="Laplace")
        panel.set(ylim=(0, 1.45 * panel.get_ylim()[1]), xlabel="unconstrained coordinate")
        panel.set_title(f"{row['model']}\n{row['coordinate']}", fontsize=8)
        panel.text(
            0.97,
            0.95,
            f"means {row['mean_difference']:.2f} sd\nsds {row['sd_difference']:.1%}",
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=7,
            color=BLACK,
        )
    for panel in panels[::_COLUMNS]:
        panel.set_ylabel("density")
    legend_below(figure, panels[0], 2)
    return figure

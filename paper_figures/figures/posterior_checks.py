"""Whether posteriors are right: Laplace's Gaussian over the draws of NUTS, and ranks of simulation-based calibration.

NUTS and Laplace are compared on the parameters of small models, and on functions of a small transformer's weights.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom, norm

from paper_figures.figures.style import BLACK, BLUE, ORANGE, legend_below, panel_grid

LAPLACE_NUTS_CAPTION = (
    "Marginal posteriors in unconstrained coordinates (positive parameters: their logarithm): draws of NUTS (grey) and "
    "Laplace's Gaussian at the mode (dashed). Parameters of the process from its own embeddings, on the line and in the "
    "plane, and embeddings of the scalar process given four tokens alone. Numbers: difference of the means in posterior "
    "standard deviations, and relative difference of the standard deviations."
)
CALIBRATION_CAPTION = (
    "Simulation-based calibration: ranks of the truth among posterior draws, over datasets drawn from the prior. The band "
    "holds each bin of a uniform law with 99 % probability (one in a hundred bins leaves it by chance). Piled up at both "
    "ends: the posterior is too narrow; at one end: it is shifted. Numbers: p-value of a chi-square test."
)

TRANSFORMER_CAPTION = (
    "Marginal posteriors of attention logits, output logits and det J of a two-layer transformer with 216 free weights, "
    "on held-out texts: draws of NUTS (grey), the quantity at draws of Laplace's Gaussian of the weights (solid), and "
    "the quantity made linear in the weights at the mode (dashed; a line where its standard deviation is below a tenth "
    "of a bin). Of every quantity, the entries with the median and the largest distance between the linearised Gaussian "
    "and NUTS. Numbers: excess kurtosis of the draws of NUTS, 0 for a Gaussian, this distance, and the share of the "
    "solid histogram that lies outside the panel."
)


def draw_laplace_nuts(inference: dict[str, Any]) -> Figure:
    rows = inference["laplace-nuts"]["rows"]
    figure, panels = panel_grid(len(rows), 3, 2.0, "density")
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
    legend_below(figure, panels[0], 2)
    return figure


def draw_transformer(sections: dict[str, Any]) -> Figure:
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


def draw_calibration(inference: dict[str, Any]) -> Figure:
    rows = inference["calibration"]["rows"]
    figure, panels = panel_grid(len(rows), 4, 2.0, "datasets per bin", sharey=True)
    for panel, row in zip(panels, rows, strict=True):
        counts = np.asarray(row["counts"])
        low, high = binom.ppf([0.005, 0.995], counts.sum(), 1 / len(counts))
        edges = np.linspace(0, 1, len(counts) + 1)
        panel.axhspan(low, high, color="#dddddd", zorder=0)
        panel.axhline(counts.sum() / len(counts), color=BLACK, linewidth=0.8, linestyle=":")
        panel.stairs(counts, edges, color=BLUE)
        panel.grid(visible=False)
        panel.text(0.97, 0.95, f"p = {row['p_value']:.2g}", transform=panel.transAxes, ha="right", va="top", fontsize=7)
        title = f"{row['method']}: {row['quantity']}"
        panel.set(ylim=(0, 1.25 * max(high, counts.max())), title=title, xlabel="rank / number of draws")
    return figure

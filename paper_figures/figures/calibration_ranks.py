"""Ranks of what datasets were drawn with among posterior draws, for every method and quantity."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom

from paper_figures.figures.style import BLACK, BLUE, panel_grid

CAPTION = (
    "Simulation-based calibration: ranks of the truth among posterior draws, over datasets drawn from the prior. The band "
    "holds each bin of a uniform law with 99 % probability (one in a hundred bins leaves it by chance). Piled up at both "
    "ends: the posterior is too narrow; at one end: it is shifted. Numbers: p-value of a chi-square test."
)
_COLUMNS = 4


def draw(inference: dict[str, Any]) -> Figure:
    rows = inference["calibration"]["rows"]
    figure, panels = panel_grid(len(rows), _COLUMNS, 2.0, sharey=True)
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
    for panel in panels[::_COLUMNS]:
        panel.set_ylabel("datasets per bin")
    return figure

"""Measured amplification of noise against 1 / sigma_min on the way to the boundary."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE


def draw(check: dict[str, Any]) -> Figure:
    rows = check["details"]["approach_to_the_boundary"]
    figure, panel = plt.subplots(figsize=(4.6, 3.0))
    margins = [row["margin"] for row in rows]
    panel.loglog(margins, [row["amplification"] for row in rows], "o", color=BLUE, label="measured by solving")
    panel.loglog(margins, [1 / margin for margin in margins], "--", color=BLACK, linewidth=1.0, label="1 / sigma_min")
    panel.set_xlabel("conditioning margin sigma_min(J)")
    panel.set_ylabel("amplification of noise")
    panel.legend(frameon=False)
    return figure

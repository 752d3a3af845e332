"""Share of the multipliers that the support tokens carry along the central path."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    details = check["details"]
    figure, panel = plt.subplots(figsize=(4.6, 3.0))
    panel.semilogx(
        details["lambda"], details["mean_share_of_support_tokens"], "o-", color=BLUE, label="mean over problems"
    )
    smallest = details["smallest_share_of_support_tokens"]
    panel.semilogx(details["lambda"], smallest, "s:", color=ORANGE, fillstyle="none", label="smallest")
    panel.axhline(
        details["random_positions_share"], color=BLACK, linestyle="--", linewidth=1.0, label="random positions"
    )
    panel.invert_xaxis()
    panel.set_xlabel("barrier weight lambda, falling along the path")
    panel.set_ylabel("share on the support tokens")
    panel.legend(frameon=False)
    return figure

"""How embeddings tend to deterministic attention as the noise vanishes."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    limit = check["details"]["vanishing_noise"]
    figure, panel = plt.subplots(figsize=(4.6, 3.0))
    for name, rate, colour, style in (
        ("distance_to_deterministic_attention", limit["rate_of_distance"], BLUE, "o-"),
        ("remainder_of_linear_law", limit["rate_of_remainder"], ORANGE, "s--"),
    ):
        label = f"{name.replace('_', ' ')}, fitted power {rate:.2f}"
        panel.loglog(limit["sigma"], limit[name], style, color=colour, label=label)
    panel.set_xlabel("noise scale sigma (units of u)")
    panel.set_ylabel("largest entry (units of u)")
    figure.legend(loc="outside upper left", frameon=False)
    return figure

"""Figure and counterexample of a claim against its tolerance, for claims that are one number."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE

# An exact 0 has no place on a logarithmic axis.
SMALLEST = 1e-17


def draw(check: dict[str, Any]) -> Figure:
    figure, panel = plt.subplots(figsize=(5.4, 1.7))
    rows = [("claim", abs(float(check["figure"])), BLUE, "o")]
    rows += [("counterexample", abs(float(check["counterexample_figure"])), ORANGE, "s")]
    for place, (_, value, colour, marker) in enumerate(rows):
        panel.plot(max(value, SMALLEST), place, marker, color=colour, markersize=7)
        panel.annotate(
            f"{value:.2g}", (max(value, SMALLEST), place), textcoords="offset points", xytext=(0, 7), ha="center"
        )
    panel.axvline(max(check["tolerance"], SMALLEST), color=BLACK, linestyle="--", linewidth=1.0)
    panel.annotate(
        f"tolerance {check['tolerance']:.0e}" if check["tolerance"] else "tolerance 0",
        (max(check["tolerance"], SMALLEST), 0.5),
        textcoords="offset points",
        xytext=(4, 0),
        va="center",
        fontsize=8,
    )
    panel.set_xscale("log")
    panel.set_ylim(-0.6, 1.7)
    panel.margins(x=0.12)
    panel.set_yticks([0, 1], [name for name, *_ in rows])
    panel.set_xlabel(f"size of the figure (0 is drawn at {SMALLEST:.0e})", fontsize=8)
    return figure

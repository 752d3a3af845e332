"""Kolmogorov-Smirnov statistics over their critical value: right density, wrong densities, past the boundary."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    details = check["details"]
    right = [(f"right; {name}", value) for name, value in details["ratio_to_critical_value"]["right"].items()]
    wrong = list(details["rejection_of_wrong_densities"].items())
    beyond = details["past_the_boundary"]
    wrong += [("past the boundary, a = 4", beyond["ratio"])]
    wrong += [("the same, det J > 0 throughout", beyond["ratio_of_converged_alone"])]
    figure, panel = plt.subplots(figsize=(6.0, 4.2))
    for rows, start, colour, marker in ((right, 0, BLUE, "o"), (wrong, len(right), ORANGE, "s")):
        panel.plot([value for _, value in rows], range(start, start + len(rows)), marker, color=colour)
    panel.set_yticks(range(len(right) + len(wrong)), [name for name, _ in right + wrong], fontsize=7)
    panel.axvline(1.0, color=BLACK, linestyle="--", linewidth=1.0)
    panel.set_xscale("log")
    panel.set_xlabel("statistic over critical value (above 1: rejected)")
    return figure

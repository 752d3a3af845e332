"""The certified radius against the nearest crossing that a search found."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE


def draw(check: dict[str, Any]) -> Figure:
    details = check["details"]
    points = [point for point in details["distance_found_and_radius"] if point[1] > 0]
    figure, panel = plt.subplots(figsize=(4.6, 3.2))
    distances = [distance for distance, _ in points]
    label = f"drawn problems, median ratio {details['median_tightness']:.2f}"
    panel.loglog(distances, [radius for _, radius in points], "o", color=BLUE, fillstyle="none", label=label)
    ends = [min(distances), max(distances)]
    panel.loglog(ends, ends, "--", color=BLACK, linewidth=1.0, label="radius = distance: never above")
    panel.set_xlabel("distance to the nearest crossing found (units of u)")
    panel.set_ylabel("certified radius (units of u)")
    panel.legend(frameon=False)
    return figure

"""Mass of the density and expected number of roots, against the strength of attention."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    figure, panel = plt.subplots(figsize=(4.6, 3.0))
    rows = [row for row in check["details"]["one_dimension"] if row["past"] == [-1.0, 1.0, 0.3]]
    for noise_scale, colour, marker in ((0.5, BLUE, "o"), (0.2, ORANGE, "s")):
        chosen = [row for row in rows if row["noise_scale"] == noise_scale]
        a = [row["strength"] for row in chosen]
        label = f"mass, sigma = {noise_scale:g}"
        panel.plot(a, [row["mass"] for row in chosen], marker, color=colour, fillstyle="none", label=label)
        panel.plot(a, [row["expected_roots"] for row in chosen], "-", color=colour, linewidth=1.0, label="roots")
    panel.plot(a, [row["signed_mass"] for row in chosen], "--", color=BLACK, linewidth=1.0, label="signed mass")
    panel.set_xlabel("attention strength a, past (-1, 1, 0.3)")
    panel.set_ylabel("mass; expected number of roots")
    panel.legend(frameon=False)
    return figure

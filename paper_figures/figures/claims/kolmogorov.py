"""How far each marginal is from the shorter density, next to the estimated error of its integral."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    rows = check["details"]["embeddings"]
    names = [f"{row['problem']}: {row['kept']} kept, {row['integrated_out']} out" for row in rows]
    figure, panel = plt.subplots(figsize=(6.0, 3.6))
    places = range(len(rows))
    differences = [max(abs(row["marginal_over_shorter_density"] - 1), 1e-16) for row in rows]
    panel.plot(differences, places, "o", color=BLUE, label="|marginal / shorter density - 1|")
    panel.plot(
        [row["quadrature_error"] for row in rows], places, "s", color=ORANGE, fillstyle="none", label="error estimate"
    )
    panel.axvline(check["tolerance"], color=BLACK, linestyle="--", linewidth=1.0, label="tolerance")
    panel.set_xscale("log")
    panel.set_yticks(places, names, fontsize=7)
    panel.set_xlabel("relative difference (values below 1e-16 drawn there)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure

"""Determinant margins of trained models: cross-entropy alone against the barrier and the full MAP objective."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.runs import load_runs
from paper_figures.style import METHOD_STYLES

NAME = "margin_histograms"
CAPTION = (
    "Signed determinant margins det J_i on validation text, all seeds together, positions from the third on. Left: "
    "every head of every layer alone, on its normalised inputs with identity values. Right: the embedding-prior stage, "
    "which plain cross-entropy leaves at its random start. Dotted line: the degeneracy boundary; the axis is linear within 1 "
    "of it and logarithmic beyond. A margin far above 1 is no merit in itself: the two-sided barrier keeps rewarding "
    "distance where no wall is near."
)
_PANELS = (
    ("layers", "heads of every layer", ("ce", "margin@layers", "map@layers")),
    ("embedding", "embedding-prior stage", ("ce", "margin@embedding", "map@embedding")),
)


def draw(runs: Path | None = None) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    if runs is None:
        raise ValueError("--runs: needed for this figure; pass the folder of a sweep.")
    sweep = load_runs(runs)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.0))
    for panel, (site, title, methods) in zip(panels, _PANELS, strict=True):
        values = {method: sweep.margins(method, site) for method in methods if method in sweep.by_method}
        largest = max(float(np.abs(v[np.isfinite(v)]).max()) for v in values.values())
        reach = np.log10(max(largest, 10.0))
        outside = np.logspace(0, reach, int(6 * reach) + 1)
        edges = np.concatenate([-outside[::-1], np.linspace(-1, 1, 21)[1:-1], outside])
        for method, margins in values.items():
            counts, _ = np.histogram(np.clip(margins, edges[0], edges[-1]), edges)
            negative = (margins <= 0).mean()
            style = {k: v for k, v in METHOD_STYLES[method].items() if k != "marker"}
            panel.stairs(counts / counts.sum(), edges, label=f"{method} (det J <= 0: {negative:.2%})", **style)
        panel.axvline(0.0, color="black", linestyle=":", linewidth=1.0)
        panel.set_xscale("symlog", linthresh=1.0)
        smallest = min(float(v.min()) for v in values.values())
        panel.set_xlim(max(1.5 * min(smallest, -0.5), edges[0]), edges[-1])
        panel.set_yscale("log")
        panel.set_xlabel("det J_i (dimensionless)")
        panel.set_title(title)
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    panels[0].set_ylabel("share of positions per bin")
    return figure

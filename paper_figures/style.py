"""The one style of all figures: readable in grey, by shape and line as well as by colour."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prob_transformer.provenance import atomic_path

mpl.use("Agg")

# Okabe-Ito colours, safe for colour-blind readers; line styles and markers repeat the distinction in grey.
BLACK, BLUE, ORANGE, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "ce": {"color": BLACK, "linestyle": "-", "marker": "o"},
    "margin@embedding": {"color": BLUE, "linestyle": "--", "marker": "s"},
    "margin@layers": {"color": ORANGE, "linestyle": "-.", "marker": "^"},
    "map@embedding": {"color": GREEN, "linestyle": ":", "marker": "D"},
    "map@layers": {"color": PURPLE, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
}

RC: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    # Text in a PDF stays text, and the file is the same every time it is drawn.
    "pdf.fonttype": 42,
    "svg.hashsalt": "prob-transformer",
}


def panel_grid(count: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, each row `height` inches high; what is left of the last is empty."""
    rows = -(-count // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(7.2, height * rows), squeeze=False, **options)
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    return figure, list(panels.flat[:count])


def save(figure: Figure, name: str, out: Path) -> list[Path]:
    """Write `name`.png and `name`.pdf into `out` and return their paths; ValueError if the folder cannot be written."""
    paths = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        path = out / f"{name}{suffix}"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
        paths.append(path)
    return paths

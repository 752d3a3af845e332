"""The one style of all figures: readable in grey, by shape and line as well as by colour."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from prob_transformer.files import atomic_path

mpl.use("Agg")

# Okabe-Ito colours, and six others for the competitors, safe for colour-blind readers; line styles and markers repeat
# the distinction in grey. Barriers have filled markers, competitors hollow ones.
BLACK, BLUE, ORANGE, GREEN, PURPLE = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, INDIGO, WINE, OLIVE, GREY, TEAL = (
    "#56B4E9", "#E69F00", "#332288", "#882255", "#999933", "#777777", "#44AA99",
)  # fmt: skip

RUST, NAVY = "#994F00", "#1F3A93"


def _hollow(color: str, linestyle: Any, marker: str) -> dict[str, Any]:
    return {"color": color, "linestyle": linestyle, "marker": marker, "markerfacecolor": "white"}


METHOD_STYLES: dict[str, dict[str, Any]] = {
    "ce": {"color": BLACK, "linestyle": "-", "marker": "o"},
    "margin@embedding": {"color": BLUE, "linestyle": "--", "marker": "s"},
    "margin@layers": {"color": ORANGE, "linestyle": "-.", "marker": "^"},
    "map@embedding": {"color": GREEN, "linestyle": ":", "marker": "D"},
    "map@layers": {"color": PURPLE, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    "one-sided@embedding": {"color": SKY, "linestyle": (0, (7, 2)), "marker": "P"},
    "one-sided@layers": {"color": AMBER, "linestyle": (0, (7, 1.5, 2, 1.5)), "marker": "X"},
    "trace@layers": {"color": RUST, "linestyle": (0, (1, 1)), "marker": "*"},
    "frobenius@layers": {"color": NAVY, "linestyle": (0, (5, 3, 1, 3)), "marker": "H"},
    "dropout": _hollow(INDIGO, (0, (3, 1)), "<"),
    "weight-decay": _hollow(WINE, (0, (1, 2.5)), ">"),
    "embedding-noise": _hollow(OLIVE, (0, (4, 1, 1, 1)), "h"),
    "jacobian": _hollow(GREY, (0, (9, 2, 1, 2)), "p"),
    "spectral": _hollow(TEAL, (0, (2, 1, 2, 3)), "d"),
}


# Of a line at a value that matters, such as the boundary.
DOTTED: dict[str, Any] = {"color": BLACK, "linestyle": ":", "linewidth": 1.0}


def line_style(method: str) -> dict[str, Any]:
    """The style of a method where points are not marked."""
    return {trait: value for trait, value in METHOD_STYLES[method].items() if trait in ("color", "linestyle")}


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


def signed_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Those of the ticks in view, as plain numbers, on an axis that is linear near 0 and logarithmic beyond."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def panel_grid(count: int, columns: int, height: float, ylabel: str, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, each row `height` inches high; what is left of the last is empty.

    The label of the vertical axis stands at the first panel of every row.
    """
    rows = -(-count // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(7.2, height * rows), squeeze=False, **options)
    for panel in panels.flat[count:]:
        panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel(ylabel)
    return figure, list(panels.flat[:count])


def legend_below(figure: Figure, panel: Axes, columns: int) -> None:
    """The legend of one panel, below all."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as an opaque PNG, an eighth smaller than Matplotlib's own; ValueError if the path cannot be written."""
    with io.BytesIO() as drawn, atomic_path(path) as temporary:
        figure.savefig(drawn, format="png")
        with Image.open(drawn) as image:
            image.convert("RGB").save(temporary, format="png", optimize=True, dpi=image.info["dpi"])


def save(figure: Figure, name: str, out: Path) -> None:
    """Write `name`.png and `name`.pdf into `out`. Raises ValueError if the folder cannot be written."""
    save_png(figure, out / f"{name}.png")
    with atomic_path(out / f"{name}.pdf") as temporary:
        figure.savefig(temporary, metadata={"CreationDate": None})

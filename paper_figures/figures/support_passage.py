"""Support tokens over a passage of real text: every character shaded by its margin, layer by layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from paper_figures.figures.style import BLACK, ORANGE
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import selected

METHODS = ("ce", "margin@layers", "one-sided@layers")
# Of every window, those closest to the boundary are marked.
SUPPORT = 3
CAPTION = (
    "A passage of validation text, never trained on, read window by window (a line each) by models trained with and without "
    "the barrier at its strength. Shade: the smallest determinant margin over the heads of a layer, black at the degeneracy "
    f"boundary, white at 1 (no attention) and above. Orange: det J < 0 in some head, past the boundary. Outlined: the {SUPPORT} support tokens of "
    "a window, smallest |det J|. Grey letters: the first two positions, whose margin is 1 by definition. "
    "One seed."
)
_SHADES = Normalize(0.0, 1.0)
_BLANKS = {"\n": "\u00b6", "\t": "\u2192"}


def draw(sweep: Runs) -> Figure:
    """The figure from a sweep; ValueError if no run of it kept a passage."""
    kept = [(one, [run["passage"] for run in one.runs if run.get("passage")]) for one in selected(sweep, METHODS)]
    shown = [(one, passages[0]) for one, passages in kept if passages]
    if not shown:
        raise ValueError(f"--runs: no run of {', '.join(METHODS)} kept a passage; run the sweep again.")
    layers = len(shown[0][1]["margins"])
    figure, panels = plt.subplots(
        layers * len(shown), 1, figsize=(7.2, 0.95 * layers * len(shown) + 0.7), squeeze=False
    )
    for place, panel in enumerate(panels[:, 0]):
        (selection, passage), layer = shown[place // layers], place % layers
        length = selection.runs[0]["provenance"]["configuration"]["context"]
        write(panel, passage["text"], passage["margins"][layer], length)
        strength = "" if selection.method == "ce" else f" at {selection.strength:g}"
        panel.set_title(f"{selection.method}{strength}, layer {layer + 1}", loc="left", pad=2)
        panel.set_ylabel("window", fontsize=7)
    panels[-1, 0].set_xlabel("position in the window (characters)")
    figure.colorbar(
        ScalarMappable(_SHADES, colormaps["Greys_r"]), ax=panels[:, 0], location="bottom", shrink=0.5, aspect=40,
        label="smallest det J over the heads (dimensionless)", extend="max",
    )  # fmt: skip
    return figure


def support_places(margins: Sequence[float | None], count: int = SUPPORT) -> list[int]:
    """Places of the smallest |det J| in one window, closest to the boundary first."""
    known = [place for place, value in enumerate(margins) if value is not None]
    return sorted(known, key=lambda place: abs(margins[place] or 0.0))[:count]


def write(panel: Axes, text: str, margins: Sequence[float | None], length: int) -> None:
    """Characters in lines of one window each, on their shades."""
    lines = -(-len(text) // length)
    for line in range(lines):
        window = slice(line * length, (line + 1) * length)
        support = support_places(margins[window])
        for place, (character, margin) in enumerate(zip(text[window], margins[window], strict=True)):
            _character(panel, place, line, character, margin)
            if place in support:
                panel.add_patch(Rectangle((place, line), 1, 1, fill=False, edgecolor=BLACK, linewidth=1.1, zorder=3))
    panel.set(xlim=(0, length), ylim=(lines, 0))
    panel.set_yticks(np.arange(lines) + 0.5, [str(line + 1) for line in range(lines)])
    panel.tick_params(labelsize=7, length=0)
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _character(panel: Axes, place: int, line: int, character: str, margin: float | None) -> None:
    if margin is None:
        fill, ink = "white", "#999999"
    elif margin <= 0:
        fill, ink = ORANGE, "black"
    else:
        shade = float(_SHADES(min(margin, 1.0)))
        fill, ink = to_hex(colormaps["Greys_r"](shade)), "white" if shade < 0.5 else "black"
    panel.add_patch(Rectangle((place, line), 1, 1, facecolor=fill, edgecolor="none"))
    shown = _BLANKS.get(character, character)
    panel.text(
        place + 0.5, line + 0.52, shown, color=ink, family="monospace", fontsize=8, ha="center", va="center_baseline",
        parse_math=False, clip_on=True,
    )  # fmt: skip

"""Loss under embedding noise for every method at its strength: noise of fixed size, and relative to the embeddings."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.analysis.selection import Selection, selected
from paper_figures.runs import BARRIERS, BASELINE, COMPETITORS, clean_loss, load_runs, perturbed
from paper_figures.style import METHOD_STYLES

NAME = "noise_loss"
SOURCE = "runs"
CAPTION = (
    "Test loss with Gaussian noise added to the input embeddings, every method at the strength chosen on clean validation "
    "loss; points are means over seeds, bars the smallest and largest seed. Left: noise of a fixed standard deviation. "
    "Right: as a multiple of the root mean square of each model's own embeddings. Both are shown because a penalty can win "
    "on the left by making the embeddings larger. Above: the barrier's variants; below: what a user would pick instead."
)
_COLUMNS = (
    ("embedding-noise", "standard deviation of the noise (units of u)"),
    ("relative-embedding-noise", "standard deviation of the noise / RMS of u"),
)
_ROWS = (("barriers", (BASELINE, *BARRIERS)), ("competitors", (BASELINE, *COMPETITORS)))


def draw(runs: Path) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    sweep = load_runs(runs)
    figure, panels = plt.subplots(2, 2, figsize=(7.2, 6.6), sharex="col", sharey=True)
    for row, (title, methods) in zip(panels, _ROWS, strict=True):
        shown = selected(sweep, methods)
        for panel, (kind, label) in zip(row, _COLUMNS, strict=True):
            for selection in shown:
                _curve(panel, selection, kind)
            panel.set_xlabel(label)
            panel.set_title(title)
        row[0].set_ylabel("test loss (nats per character)")
        row[0].legend(frameon=False, loc="upper left")
    return figure


def _curve(panel: Axes, selection: Selection, kind: str) -> None:
    rows = [perturbed(run, "test", kind) for run in selection.runs]
    losses = np.array(
        [
            [clean_loss(run, "test"), *(row["nats_per_character"] for row in of_run)]
            for run, of_run in zip(selection.runs, rows, strict=True)
        ]
    )
    mean = losses.mean(axis=0)
    panel.errorbar(
        [0.0, *(row["level"] for row in rows[0])],
        mean,
        yerr=np.stack([mean - losses.min(axis=0), losses.max(axis=0) - mean]),
        capsize=2,
        elinewidth=0.8,
        label=selection.method,
        **METHOD_STYLES[selection.method],
    )

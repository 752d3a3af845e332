"""Loss under embedding noise for every method: absolute noise, and noise relative to the size of the embeddings."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.runs import load_runs, noise_rows
from paper_figures.style import METHOD_STYLES

NAME = "noise_loss"
CAPTION = (
    "Validation loss with Gaussian noise added to the input embeddings; points are means over seeds, bars the smallest "
    "and largest seed. Left: noise of a fixed standard deviation. Right: as a multiple of the root mean square of each "
    "model's own embeddings. Both are shown because a penalty can win on the left by making the embeddings larger."
)
_PANELS = (
    ("absolute", "standard deviation of the noise (units of u)"),
    ("relative", "standard deviation of the noise / RMS of u"),
)


def draw(runs: Path | None = None) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    if runs is None:
        raise ValueError("--runs: needed for this figure; pass the folder of a sweep.")
    sweep = load_runs(runs)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
    for panel, (kind, label) in zip(panels, _PANELS, strict=True):
        for method, members in sweep.by_method.items():
            clean = [[run["clean_loss"]["nats_per_character"]] for run in members]
            noisy = [[row["nats_per_character"] for row in noise_rows(run, kind)] for run in members]
            losses = np.hstack([clean, noisy])
            sigmas = [0.0] + [row["sigma"] for row in noise_rows(members[0], kind)]
            mean = losses.mean(axis=0)
            spread = np.stack([mean - losses.min(axis=0), losses.max(axis=0) - mean])
            panel.errorbar(sigmas, mean, yerr=spread, capsize=2, elinewidth=0.8, label=method, **METHOD_STYLES[method])
        panel.set_xlabel(label)
    panels[0].set_ylabel("loss (nats per character)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure

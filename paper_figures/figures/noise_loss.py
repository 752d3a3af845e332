"""Loss under embedding noise for every method at its strength: noise of fixed size, and relative to the embeddings."""

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.figures.style import METHOD_STYLES, legend_below, signed_ticks
from paper_figures.study.design import BARRIERS, BASELINE, COMPETITORS
from paper_figures.study.runs import Runs, clean_loss, perturbed
from paper_figures.study.strength_selection import Selection, selected

CAPTION = (
    "Test loss with Gaussian noise added to the input embeddings, every method at the strength chosen on clean validation "
    "loss. Left: noise of a fixed standard deviation. Right: as a multiple of the root mean square of each model's own "
    "embeddings. Both are shown because a penalty can win on the left by making the embeddings larger. First row: the loss. "
    "Below: the loss minus that of plain cross-entropy with the same seed and noise, for the barrier's variants and for "
    "what a user would pick instead; below 0 is better, and the axis is linear within 0.1 of it and logarithmic beyond. "
    "Points are means over seeds, bars the smallest and largest seed."
)
_COLUMNS = (
    ("embedding-noise", "standard deviation of the noise (units of u)"),
    ("relative-embedding-noise", "standard deviation of the noise / RMS of u"),
)
_TICKS = (-0.4, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.4, 0.8)


def draw(sweep: Runs) -> Figure:
    plain = selected(sweep, (BASELINE,))[0]
    barriers, competitors = selected(sweep, BARRIERS), selected(sweep, COMPETITORS)
    figure, panels = plt.subplots(3, 2, figsize=(7.2, 8.4), sharex="col", sharey="row")
    for column, (kind, label) in enumerate(_COLUMNS):
        levels, baseline = losses(plain, kind)
        found = {one.method: losses(one, kind)[1] for one in (plain, *barriers, *competitors)}
        for method, of_seeds in found.items():
            _curve(panels[0, column], method, levels, of_seeds)
        for panel, shown in zip(panels[1:, column], (barriers, competitors), strict=True):
            panel.axhline(0.0, color="black", linewidth=1.0)
            for selection in shown:
                _curve(panel, selection.method, levels, found[selection.method] - baseline)
            panel.set_yscale("symlog", linthresh=0.1)
        panels[-1, column].set_xlabel(label)
    panels[0, 0].set_ylabel("test loss (nats per character)")
    for panel, name in zip(panels[1:, 0], ("barriers", "competitors"), strict=True):
        panel.set_ylabel(f"{name}: loss minus ce's (nats)")
        signed_ticks(panel.yaxis, _TICKS)
    legend_below(figure, panels[0, 0], 4)
    return figure


def losses(selection: Selection, kind: str) -> tuple[list[float], Float[np.ndarray, "seeds levels"]]:
    """Levels of noise, 0 first, and the test loss of every seed there, in nats per character."""
    clean = [[{"level": 0.0, "nats_per_character": clean_loss(run, "test")}] for run in selection.runs]
    rows = [first + perturbed(run, "test", kind) for first, run in zip(clean, selection.runs, strict=True)]
    losses = np.array([[row["nats_per_character"] for row in of_run] for of_run in rows])
    return [row["level"] for row in rows[0]], losses


def _curve(panel: Axes, method: str, levels: list[float], of_seeds: Float[np.ndarray, "seeds levels"]) -> None:
    mean = of_seeds.mean(axis=0)
    reach = np.stack([mean - of_seeds.min(axis=0), of_seeds.max(axis=0) - mean])
    panel.errorbar(levels, mean, yerr=reach, capsize=2, elinewidth=0.8, label=method, **METHOD_STYLES[method])

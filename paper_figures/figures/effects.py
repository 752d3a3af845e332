"""Change of the loss increase under every perturbation, a method a line: mean and interval over seeds."""

from pathlib import Path

from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, METHOD_STYLES, panel_grid, signed_ticks
from paper_figures.study.analysis import described
from paper_figures.study.comparisons import PERTURBATIONS, SMALLEST_INCREASE
from paper_figures.study.design import BASELINE
from paper_figures.study.runs import load_runs
from paper_figures.study.strength_selection import select_all

NAME = "effects"
SOURCE = "runs"
CAPTION = (
    "Change of the loss increase against plain cross-entropy on test text, every method at its strength, for the seven "
    "perturbations of the study (the first decides, the others are only described). Means over paired seeds with 95 % intervals of the t distribution; "
    "grey band: changes smaller than the 5 % declared to matter. Left of the band is better. The axis is linear within 10 % "
    "and logarithmic beyond."
)
_COLUMNS = 4
_TICKS = (-100, -10, -5, 0, 5, 10, 100, 1000)


def draw(runs: Path) -> Figure:
    """The figure from the sweep under `runs`; ValueError if there is none."""
    rows = [row for row in described(select_all(load_runs(runs)), "test") if row["method"] != BASELINE]
    figure, panels = panel_grid(len(PERTURBATIONS), _COLUMNS, 2.6, sharey=True)
    for place, (panel, (kind, level)) in enumerate(zip(panels, PERTURBATIONS, strict=True)):
        panel.axvspan(-100 * SMALLEST_INCREASE, 100 * SMALLEST_INCREASE, color="#e4e4e4", zorder=0)
        panel.axvline(0.0, color=BLACK, linestyle=":", linewidth=1.0)
        for line, row in enumerate(rows):
            found = row["perturbations"][place]
            if found["change_interval"] is not None:
                panel.plot(found["change_interval"], [line, line], color=METHOD_STYLES[row["method"]]["color"])
            if found["change_percent"] is not None:
                panel.plot(found["change_percent"], line, **METHOD_STYLES[row["method"]])
        panel.set_xscale("symlog", linthresh=10.0)
        signed_ticks(panel.xaxis, _TICKS)
        panel.set_title(f"{kind}\n{level:g}", fontsize=7)
        panel.set_xlabel("change (%)")
        panel.tick_params(axis="x", labelsize=7)
        panel.set_yticks(range(len(rows)), [row["method"] for row in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
    panels[0].set_ylabel("method")
    panels[_COLUMNS].set_ylabel("method")
    return figure

"""Change of the loss increase under every perturbation, a method a line: mean and interval over seeds."""

from matplotlib.figure import Figure

from paper_figures.figures.style import DOTTED, METHOD_STYLES, panel_grid, signed_ticks
from paper_figures.study.analysis import described
from paper_figures.study.comparisons import PERTURBATIONS, SMALLEST_INCREASE
from paper_figures.study.design import BASELINE
from paper_figures.study.runs import Runs
from paper_figures.study.strength_selection import select_all

CAPTION = (
    "Change of the loss increase against plain cross-entropy on test text, every method at its strength, for the seven "
    "perturbations of the study (the first decides, the others are only described). Means over paired seeds with 95 % intervals of the t distribution; "
    f"grey band: changes smaller than the {100 * SMALLEST_INCREASE:g} % declared to matter. Left of the band is better. The axis is linear within 10 % "
    "and logarithmic beyond."
)
_TICKS = (-100, -10, -5, 0, 5, 10, 100, 1000)


def draw(sweep: Runs) -> Figure:
    rows = [row for row in described(select_all(sweep), "test") if row["method"] != BASELINE]
    figure, panels = panel_grid(len(PERTURBATIONS), 4, 2.6, "method", sharey=True)
    for place, (panel, (kind, level)) in enumerate(zip(panels, PERTURBATIONS, strict=True)):
        panel.axvspan(-100 * SMALLEST_INCREASE, 100 * SMALLEST_INCREASE, color="#e4e4e4", zorder=0)
        panel.axvline(0.0, **DOTTED)
        for line, row in enumerate(rows):
            found, style = row["perturbations"][place], METHOD_STYLES[row["method"]]
            if found["change_interval"] is not None:
                panel.plot(found["change_interval"], [line, line], color=style["color"])
            if found["change_percent"] is not None:
                panel.plot(found["change_percent"], line, **style)
        panel.set_xscale("symlog", linthresh=10.0)
        signed_ticks(panel.xaxis, _TICKS)
        panel.set_title(f"{kind}\n{level:g}", fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_yticks(range(len(rows)), [row["method"] for row in rows])
        panel.set(xlabel="change (%)", ylim=(len(rows) - 0.5, -0.5))
    return figure

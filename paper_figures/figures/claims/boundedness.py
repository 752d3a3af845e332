"""The margin-only objective along rays to infinity, and the bound that the weight prior gives."""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper_figures.figures.style import BLACK, BLUE, ORANGE


def draw(check: dict[str, Any]) -> Figure:
    details = check["details"]
    figure, panels = plt.subplots(1, 2, figsize=(6.6, 3.0), sharey=True)
    bound = details["lower_bound_with_prior"]
    panels[0].semilogx(
        details["strengths"], details["without_prior_A_growing"], "o-", color=BLUE, label="no weight prior"
    )
    panels[0].set_xlabel("factor t on A")
    panels[0].set_ylabel("margin-only objective (nats)")
    free = details["with_prior_free_embeddings_growing"]
    panels[1].semilogx(
        details["sizes_of_free_embeddings"], free, "s--", color=ORANGE, label="weight prior, free embeddings"
    )
    panels[1].set_xlabel("factor c on the embeddings")
    for panel in panels:
        panel.axhline(bound, color=BLACK, linestyle=":", linewidth=1.0, label="bound with prior, embeddings fixed")
        panel.legend(frameon=False, loc="lower left")
    return figure

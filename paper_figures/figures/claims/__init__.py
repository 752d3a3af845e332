"""One picture a claim, drawn from the figures that the checks saved: `python -m paper_figures.figures.claims`."""

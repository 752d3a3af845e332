"""The figures, one a file: `python -m paper_figures` draws them all from saved results, as PNG and PDF."""

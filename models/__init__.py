"""Models composed from the library, run from a checkout with `python -m models.NAME`."""

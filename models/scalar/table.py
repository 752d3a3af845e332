"""Draws of what is unknown, next to the truth that a dataset was drawn with."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float
from rich.table import Table

from models.scalar.dataset import Dataset

INTERVAL = (0.025, 0.975)


class Row(NamedTuple):
    """One unknown: its truth, the mean of its draws, and their standard deviation and quantiles, None for one draw."""

    name: str
    truth: float
    estimate: float
    deviation: float | None
    interval: tuple[float, float] | None


def summarise(name: str, truth: float, draws: Float[np.ndarray, "..."]) -> Row:
    """The row of one unknown from all its draws, of all chains; a single draw has neither deviation nor interval."""
    if draws.size == 1:
        return Row(name, truth, draws.item(), None, None)
    low, high = np.quantile(draws, INTERVAL)
    return Row(name, truth, float(draws.mean()), float(draws.std(ddof=1)), (float(low), float(high)))


def rows_of(tree: xr.DataTree, data: Dataset) -> list[Row]:
    """Rows of a and noise_scale, or of the embeddings of the first sequence where those are what was inferred."""
    posterior = tree["posterior"].to_dataset()
    if "embeddings" in posterior:
        draws, truth = posterior["embeddings"].values[..., 0], np.asarray(data.embeddings[0, :, 0])
        return [summarise(f"embedding {i + 1}", float(u), draws[..., i]) for i, u in enumerate(truth)]
    return [
        summarise("a", data.a, -posterior["b"].values),
        summarise("noise_scale", data.noise_scale, posterior["noise_scale"].values),
    ]


def table(title: str, rows: list[Row]) -> Table:
    """The rows as a table for the terminal."""
    shown = Table(title=title)
    shown.add_column("name")
    for column in ("truth", "estimate", "sd", "95 % interval", "truth inside"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spread = ["-", "-", "-"]
        if row.deviation is not None and row.interval is not None:
            low, high = row.interval
            inside = "yes" if low <= row.truth <= high else "no"
            spread = [f"{row.deviation:.4f}", f"{low:.4f}, {high:.4f}", inside]
        shown.add_row(row.name, f"{row.truth:.4f}", f"{row.estimate:.4f}", *spread)
    return shown

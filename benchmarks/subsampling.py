"""Section "subsampling": how far estimates of the mean barrier lie from it, and what deviation they report."""

import math
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.section import Column, Section
from benchmarks.sizes import Sizes
from benchmarks.training_step import EXACT, SUBSAMPLED, configurations, describe, prepare


def summary(exact: list[float], estimates: list[float], variances: list[float]) -> dict[str, float]:
    """Mean barrier, reported deviation (root of the mean variance), and root mean square and mean of the errors."""
    difference = np.asarray(estimates) - np.asarray(exact)
    return {
        "mean": float(np.mean(exact)),
        "reported_deviation": math.sqrt(np.mean(variances)),
        "error": math.sqrt(np.mean(difference**2)),
        "mean_error": float(difference.mean()),
    }


def run_subsampling(sizes: Sizes) -> dict[str, Any]:
    """Estimates in the training step against the exact mean of the same batch, over several batches and draws."""
    configs = configurations(sizes)
    exact_step, sampled_step = (prepare(sizes, configs[name]) for name in (EXACT, SUBSAMPLED))
    exact, estimates, variances = [], [], []
    for index in tqdm(range(sizes.draws), desc="subsampling", unit="batch", leave=False):
        exact.append(float(exact_step(index)[1].penalty))
        terms = sampled_step(index)[1]
        estimates.append(float(terms.penalty))
        variances.append(float(terms.penalty_variance))
    row = {"share": sizes.share, "draws": sizes.draws, **summary(exact, estimates, variances)}
    raw = {"exact": exact, "estimates": estimates, "variances": variances}
    return {"setting": describe(sizes), "rows": [{**row, **raw}], "targets": [], "notes": []}


SECTION = Section(
    "subsampling",
    "The subsampled barrier: spread of its estimate",
    "Each batch has an exact mean barrier and one estimate of it. The reported deviation is the root of the mean of "
    "the variances that the estimates carry; the actual one is the root mean square of estimate - exact. The estimate "
    "is unbiased, so the mean error shrinks with the number of batches.",
    (
        Column("share", "share", "number"),
        Column("draws", "batches", "count"),
        Column("mean", "mean barrier, nats", "number"),
        Column("reported_deviation", "reported deviation, nats", "number"),
        Column("error", "actual deviation, nats", "number"),
        Column("mean_error", "mean error, nats", "number"),
    ),
    run_subsampling,
)

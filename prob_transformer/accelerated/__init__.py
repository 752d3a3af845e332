"""The jitted path: the same numbers as the reference in `prob_transformer`, under the same names, at scale.

Read in this order: elimination (many small inverses), cells (what is swept), sweep (the tiles), log_det (its gradient),
change_of_variables, barrier, margin; sharding spreads the cells over devices.
"""

from prob_transformer.accelerated.barrier import MeanBarrier, barrier, mean_barrier, subsampled_barrier
from prob_transformer.accelerated.cells import DEFAULT_TILING, Cells, Tiling
from prob_transformer.accelerated.change_of_variables import attention_mean, residual_and_log_det
from prob_transformer.accelerated.margin import (
    ConditioningMargin,
    conditioning_margin,
    stability_margin,
    support_tokens,
)
from prob_transformer.accelerated.sharding import (
    mesh,
    sharded_mean_barrier,
    sharded_residual_and_log_det,
    sharded_subsampled_barrier,
)

__all__ = [
    "DEFAULT_TILING",
    "Cells",
    "ConditioningMargin",
    "MeanBarrier",
    "Tiling",
    "attention_mean",
    "barrier",
    "conditioning_margin",
    "mean_barrier",
    "mesh",
    "residual_and_log_det",
    "sharded_mean_barrier",
    "sharded_residual_and_log_det",
    "sharded_subsampled_barrier",
    "stability_margin",
    "subsampled_barrier",
    "support_tokens",
]

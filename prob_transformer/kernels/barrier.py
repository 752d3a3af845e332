"""The mean barrier at scale, with value and gradient in one sweep, and an unbiased share of it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer.kernels.log_det import log_det_total, subsampled_log_det_total
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling


class BarrierPenalty(NamedTuple):
    """Mean penalty in nats () and share of det J_i <= 0 (), over all layers, heads, sequences and positions.

    `variance` () estimates that of the mean where it was taken from a share of the heads and sequences, else 0.
    """

    mean: Float[Array, ""]
    negative_share: Float[Array, ""]
    variance: Float[Array, ""]


@partial(jax.jit, static_argnums=1, inline=True)
def _mean_barrier(cells: Projections, tiling: Tiling) -> BarrierPenalty:
    flat = cells.flat()
    scale = jnp.full(
        (flat.queries.shape[0], flat.length), -1 / (flat.queries.shape[0] * flat.length), flat.queries.dtype
    )
    total, sign, _ = log_det_total(flat, scale, tiling)
    return BarrierPenalty(total, (sign <= 0).mean(dtype=total.dtype), jnp.zeros_like(total))


@in_float32_at_least
def mean_barrier(cells: Projections, tiling: Tiling = DEFAULT_TILING) -> BarrierPenalty:
    """Mean of b_i over all cells (..., H, p, n) and positions; its gradient is found in the same sweep as its value."""
    return _mean_barrier(cells, tiling)


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _subsampled_barrier(key: PRNGKeyArray, cells: Projections, share: float, tiling: Tiling) -> BarrierPenalty:
    flat = cells.flat()
    count = flat.queries.shape[0] * flat.length
    total, variance, negative_share = subsampled_log_det_total(flat, key, share, tiling)
    return BarrierPenalty(-total / count, negative_share, jax.lax.stop_gradient(variance) / count**2)


@in_float32_at_least
def subsampled_barrier(
    key: PRNGKeyArray, cells: Projections, share: float, tiling: Tiling = DEFAULT_TILING
) -> BarrierPenalty:
    """Unbiased estimate of the mean of b_i from a share of the cells, drawn anew for every block of queries.

    Cells (..., H, p, n) are sequences, heads and layers alike; each block of queries sees `share` of them, at least
    two. The gradient is unbiased as well, being that of the estimate. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; pass a share of the cells greater than 0 and at most 1.")
    return _subsampled_barrier(key, cells, share, tiling)

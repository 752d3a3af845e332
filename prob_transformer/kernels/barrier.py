"""The mean barrier at scale, with value and gradient in one sweep, and an unbiased share of it.

`prob_transformer.barrier_penalty` checks what it hands in, and casts it to one dtype.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

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
def mean_barrier(cells: Projections, tiling: Tiling = DEFAULT_TILING) -> BarrierPenalty:
    """Mean of b_i over all cells (..., H, p, n) and positions; its gradient is found in the same sweep as its value."""
    flat = cells.flat()
    shape = (flat.queries.shape[0], flat.length)
    scale = jnp.full(shape, -1 / (shape[0] * shape[1]), flat.queries.dtype)
    total, values = log_det_total(flat, scale, tiling)
    return BarrierPenalty(total, (values.sign <= 0).mean(dtype=total.dtype), jnp.zeros_like(total))


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def subsampled_barrier(
    key: PRNGKeyArray, cells: Projections, share: float, tiling: Tiling = DEFAULT_TILING
) -> BarrierPenalty:
    """Unbiased estimate of the mean of b_i from a share in (0, 1] of the cells, drawn anew for every block of queries.

    Cells (..., H, p, n) are sequences, heads and layers alike; each block of queries sees `share` of them, at least
    two. The gradient is unbiased as well, being that of the estimate.
    """
    flat = cells.flat()
    count = flat.queries.shape[0] * flat.length
    total, variance, negative_share = subsampled_log_det_total(flat, key, share, tiling)
    return BarrierPenalty(-total / count, negative_share, jax.lax.stop_gradient(variance) / count**2)

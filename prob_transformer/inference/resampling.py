"""Systematic resampling: N particles from N weights with one uniform draw.

    count of particle k = number of points (j + V) / N, j = 0..N-1, V ~ Uniform(0, 1], between W_1 + .. + W_{k-1} and
    W_1 + .. + W_k

so every count is N W_k rounded down or up and its expectation is N W_k exactly: what keeps the evidence unbiased.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def systematic_resampling(key: PRNGKeyArray, weights: Float[Array, " N"]) -> Int[Array, " N"]:
    """Indices of the particles kept, in ascending order, given weights (N,) of any positive sum."""
    count = weights.shape[0]
    # In (0, 1], so that a particle of weight 0 at the front is never taken.
    offset = 1.0 - jax.random.uniform(key, (), weights.dtype)
    cumulative = jnp.cumsum(weights)
    points = (jnp.arange(count) + offset) / count
    # Divided by its own last entry, or rounding could leave the last points past the end.
    return jnp.searchsorted(cumulative / cumulative[-1], points)


def effective_sample_size(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """1 / sum_k W_k^2 of normalised log-weights (N,): N where all are equal, 1 where one has all, 0 where all are 0."""
    squares = jnp.exp(2 * log_weights).sum()
    # At most N by Cauchy-Schwarz, which rounding would break.
    size = jnp.minimum(1 / jnp.where(squares > 0, squares, 1.0), log_weights.shape[0])
    return jnp.where(squares > 0, size, 0.0)

"""Whole paths given all tokens, by backward simulation through the particles of every position.

The paths of the particles alone share few ancestors at early positions (`ParticleResult.distinct`). Backward simulation
draws them anew: u_n from the last weights, then for i = n-1, ..., 1 given the future u_{i+1..n} already drawn

    P(k) proportional to W_i^k  prod_{s > i} N(e_s; 0, sigma^2 I) |det J_s|,    u_s with past (u_1..i^k, u_{i+1..s-1})

and u_i = u_i^k. Every position of the future sees the candidate past, so its whole density is computed again for every
candidate: O(N n^2) per position and path, O(N n^3) per path. For short sequences.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer.embedding_process import EmbeddingProcess


def genealogy(
    ancestors: Int[Array, "n N"], indices: Int[Array, " m"], position: Int[Array, ""] | int
) -> Int[Array, "n m"]:
    """Which particle of each position the paths of particles `indices` at `position` go through; then `indices`."""

    def back(indices: Int[Array, " m"], inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        here, mothers = inputs
        return jnp.where(here <= position, mothers[indices], indices), indices

    rows = jnp.arange(ancestors.shape[0]), ancestors
    return jax.lax.scan(back, indices, rows, reverse=True)[1]


@partial(jax.jit, static_argnums=1)
def ancestral_indices(
    key: PRNGKeyArray,
    draws: int,
    log_weights: Float[Array, " N"],
    ancestors: Int[Array, "n N"],
) -> Int[Array, "draws n"]:
    """Particles of each position that `draws` paths, drawn by the last position's weights in nats, go through."""
    last = jax.random.categorical(key, log_weights, shape=(draws,))
    return genealogy(ancestors, last, ancestors.shape[0] - 1).T


@partial(jax.jit, static_argnums=1)
def smoothing_indices(
    key: PRNGKeyArray,
    draws: int,
    process: EmbeddingProcess,
    filtered: Float[Array, "n N d"],
    log_weights: Float[Array, "n N"],
    ancestors: Int[Array, "n N"],
) -> Int[Array, "draws n"]:
    """Particles of each position that `draws` paths, drawn by backward simulation, go through.

    `filtered` are the particles as they were at each position, with their weights then, in nats, and the particle of
    the position before that each descends from.
    """
    length, particles, width = filtered.shape
    positions = jnp.arange(length)

    def step(carry: Float[Array, "draws n d"], inputs: tuple[Array, Array, PRNGKeyArray]) -> tuple[Array, Array]:
        position, log_weights, key = inputs
        paths = genealogy(ancestors, jnp.arange(particles), position)
        pasts = jnp.swapaxes(filtered[positions[:, None], paths], 0, 1)

        def one_path(path_and_key: tuple[Float[Array, "n d"], PRNGKeyArray]) -> tuple[Array, Array]:
            path, key = path_and_key
            candidates = jnp.where((positions <= position)[:, None], pasts, path)
            log_future = jnp.where(positions > position, process.position_log_prob(candidates), 0.0).sum(-1)
            chosen = jax.random.categorical(key, log_weights + log_future)
            return path.at[position].set(pasts[chosen, position]), chosen

        return jax.lax.map(one_path, (carry, jax.random.split(key, draws)))

    blank = jnp.zeros((draws, length, width), filtered.dtype)
    return jax.lax.scan(step, blank, (positions, log_weights, jax.random.split(key, length)), reverse=True)[1].T

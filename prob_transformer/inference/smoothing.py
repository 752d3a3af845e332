"""Whole paths given all tokens, by backward simulation through the particles of every position.

The paths of the particles alone share few ancestors at early positions (`ParticleResult.distinct`). Backward simulation
draws them anew: u_n from the last weights, then for i = n-1, ..., 1 given the future u_{i+1..n} already drawn

    P(k) proportional to W_i^k  prod_{s > i} N(e_s; 0, sigma^2 I) |det J_s|,    u_s with past (u_1..i^k, u_{i+1..s-1})

and u_i = u_i^k. Every position of the future sees the candidate past, so its whole density is computed again for every
candidate: O(N n^2) per position and path, O(N n^3) per path. For short sequences.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._validation import is_concrete, require_count

if TYPE_CHECKING:
    from prob_transformer.inference.particles import ParticleResult


def genealogy(
    ancestors: Int[Array, "n N"], indices: Int[Array, " m"], position: Int[Array, ""] | int
) -> Int[Array, "n m"]:
    """Which particle of each position the paths of particles `indices` at `position` go through; then `indices`."""

    def back(indices: Int[Array, " m"], inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        here, mothers = inputs
        return jnp.where(here <= position, mothers[indices], indices), indices

    rows = jnp.arange(ancestors.shape[0]), ancestors
    return jax.lax.scan(back, indices, rows, reverse=True)[1]


@partial(jax.jit, static_argnums=2)
def ancestral_indices(key: PRNGKeyArray, result: ParticleResult, draws: int) -> Int[Array, "draws n"]:
    """Particles of each position that `draws` paths, drawn by the last weights, go through."""
    last = jax.random.categorical(key, result.log_weights, shape=(draws,))
    return genealogy(result.ancestors, last, result.ancestors.shape[0] - 1).T


@partial(jax.jit, static_argnums=2)
def smoothing_indices(key: PRNGKeyArray, result: ParticleResult, draws: int) -> Int[Array, "draws n"]:
    """Particles of each position that `draws` paths, drawn by backward simulation, go through."""
    length, particles, width = result.filtered.shape
    positions = jnp.arange(length)

    def step(carry: Float[Array, "draws n d"], inputs: tuple[Array, Array, PRNGKeyArray]) -> tuple[Array, Array]:
        position, log_weights, key = inputs
        pasts = jnp.swapaxes(
            result.filtered[positions[:, None], genealogy(result.ancestors, jnp.arange(particles), position)], 0, 1
        )

        def one_path(path_and_key: tuple[Float[Array, "n d"], PRNGKeyArray]) -> tuple[Array, Array]:
            path, key = path_and_key
            candidates = jnp.where((positions <= position)[:, None], pasts, path)
            log_density = result.process.position_log_prob(candidates)
            log_future = jnp.where(positions > position, log_density, 0.0).sum(-1)
            chosen = jax.random.categorical(key, log_weights + log_future)
            return path.at[position].set(pasts[chosen, position]), chosen

        return jax.lax.map(one_path, (carry, jax.random.split(key, draws)))

    blank = jnp.zeros((draws, length, width), result.filtered.dtype)
    inputs = positions, result.filtered_log_weights, jax.random.split(key, length)
    return jax.lax.scan(step, blank, inputs, reverse=True)[1].T


def smooth(key: PRNGKeyArray, result: ParticleResult, draws: int) -> Float[Array, "draws n d"]:
    """`draws` paths of embeddings given all tokens, each of equal weight, independent given the particles.

    Their law tends to the posterior as the particles grow in number; past the boundary that holds for the "direct"
    proposal only, because the weights are those of the |det J| density. Raises ValueError for fewer than one draw and
    for a result whose particles all died. Equation: module docstring.
    """
    require_count("draws", draws, 1, "the number of paths")
    if is_concrete(result.log_evidence) and not (result.log_evidence > -jnp.inf).all():
        raise ValueError("result: has status ALL_DIED; there are no paths, look at the tokens and at `unsolved` first.")
    if key is None:
        raise ValueError("key: got None; pass a JAX random key.")
    return result.filtered[jnp.arange(result.filtered.shape[0]), smoothing_indices(key, result, draws)]

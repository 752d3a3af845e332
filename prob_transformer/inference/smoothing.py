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
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._validation import is_concrete, require_count
from prob_transformer.inference.particles import ParticleResult, ParticleStatus


def _pasts_of(result: ParticleResult, position: Int[Array, ""]) -> Float[Array, "N n d"]:
    """The path up to `position` of each particle as it was there; rows after it mean nothing."""
    length, particles = result.ancestors.shape

    def back(indices, inputs):
        here, ancestors, embeddings = inputs
        return jnp.where(here <= position, ancestors[indices], indices), embeddings[indices]

    rows = jnp.arange(length), result.ancestors, result.filtered
    return jnp.swapaxes(jax.lax.scan(back, jnp.arange(particles), rows, reverse=True)[1], 0, 1)


@partial(jax.jit, static_argnums=2)
def _smooth(result: ParticleResult, key: PRNGKeyArray, draws: int) -> Float[Array, "draws n d"]:
    length, _, width = result.filtered.shape
    positions = jnp.arange(length)

    def step(paths, inputs):
        position, log_weights, key = inputs
        pasts = _pasts_of(result, position)

        def one_path(path_and_key):
            path, key = path_and_key
            candidates = jnp.where((positions <= position)[:, None], pasts, path)
            log_density = result.process.position_log_prob(candidates)
            log_future = jnp.where(positions > position, log_density, 0.0).sum(-1)
            chosen = jax.random.categorical(key, log_weights + log_future)
            return path.at[position].set(pasts[chosen, position])

        return jax.lax.map(one_path, (paths, jax.random.split(key, draws))), None

    blank = jnp.zeros((draws, length, width), result.filtered.dtype)
    inputs = positions, result.filtered_log_weights, jax.random.split(key, length)
    return jax.lax.scan(step, blank, inputs, reverse=True)[0]


def smooth(result: ParticleResult, key: PRNGKeyArray, draws: int) -> Float[Array, "draws n d"]:
    """`draws` paths of embeddings given all tokens, each of equal weight, independent given the particles.

    Their law tends to the posterior as the particles grow in number; past the boundary that holds for the "direct"
    proposal only, because the weights are those of the |det J| density. Raises ValueError for fewer than one draw and
    for a result whose particles all died. Equation: module docstring.
    """
    require_count("draws", draws, 1, "the number of paths")
    if is_concrete(result.status) and int(np.asarray(result.status)) == ParticleStatus.ALL_DIED:
        raise ValueError("result: has status ALL_DIED; there are no paths, look at the tokens and at `unsolved` first.")
    if key is None:
        raise ValueError("key: got None; pass a JAX random key.")
    return _smooth(result, key, draws)

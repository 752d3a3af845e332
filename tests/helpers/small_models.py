"""Particles on models of tokens that are small enough for integrals, compiled once for all tests; and the truth."""

from functools import partial

import jax
import numpy as np

from prob_transformer import LinearDecoder
from prob_transformer.inference import particle_filter
from theory_checks.truth.token_models import (
    BIAS,
    BUMPS,
    FIRST_SCALE,
    NOISE_SCALE,
    SCALES,
    TOKENS,
    WEIGHT,
    bump,
    conjugate_truth,
    planar,
    planar_truth,
    scalar,
    scalar_density,
    scalar_truth,
    token_probability,
)

__all__ = [
    "BIAS",
    "BUMPS",
    "FIRST_SCALE",
    "NOISE_SCALE",
    "SCALES",
    "TOKENS",
    "WEIGHT",
    "assert_within_three_standard_errors",
    "bump",
    "conjugate_truth",
    "filters",
    "planar",
    "planar_filters",
    "planar_truth",
    "scalar",
    "scalar_density",
    "scalar_truth",
    "token_probability",
]


def assert_within_three_standard_errors(samples, truth):
    samples = np.asarray(samples, float)
    assert abs(samples.mean() - truth) < 3 * samples.std(ddof=1) / np.sqrt(samples.size)


@partial(jax.jit, static_argnums=(2, 3))
def filters(attention, keys, particles, proposal, threshold):
    decoder = LinearDecoder(WEIGHT, BIAS)
    options = {"threshold": threshold, "proposal": proposal, **SCALES}
    return jax.vmap(lambda key: particle_filter(key, attention, decoder, TOKENS, particles, **options))(keys)


@partial(jax.jit, static_argnums=2)
def planar_filters(attention, keys, proposal, noise_scale, threshold):
    """d = 2, 100 particles and the tokens of Bumps."""
    options = {"noise_scale": noise_scale, "first_scale": FIRST_SCALE, "threshold": threshold, "proposal": proposal}
    return jax.vmap(lambda key: particle_filter(key, attention, BUMPS, TOKENS, 100, **options))(keys)
